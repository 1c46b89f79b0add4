"""Every field of a plan wrong in every way: one line from `read_plan`, before any work, and nothing but our own errors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from sculptor.benchmark.plan import AdapterSettings, EvaluateSettings, PlannedTask, read_plan
from sculptor.errors import DataError, SculptorError, SettingsError
from sculptor.methods.settings import AnalyzeSettings
from sculptor.training.settings import TrainSettings

COVERS = ["sculptor.training.settings"]
SECTIONS: Mapping[str, Any] = {
    "analyze": AnalyzeSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "adapter": AdapterSettings,
    "tasks": PlannedTask,
}
TASK: Mapping[str, Any] = {"name": "first", "data": ["rows.jsonl"], "test": ["rows.jsonl"]}
NAMES = [(section, field.name) for section, cls in SECTIONS.items() for field in fields(cls)]
HUGE = 10**400


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value)  # numbers, nan and inf, dates


def plan_text(section: str, changes: Mapping[str, Any]) -> str:
    """A small plan with some values of a section changed."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS} | {"tasks": dict(TASK)}
    parts[section] |= changes
    lines = ['model = "base"']
    for name, values in parts.items():
        lines += [f"[[{name}]]" if name == "tasks" else f"[{name}]"]
        lines += [f"{json.dumps(key)} = {toml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def forms(hint: Any) -> set[Any]:
    """The plain types that an annotation has in it: int, float, bool, str."""
    if get_origin(hint) is Literal:
        return {Literal}
    if get_args(hint):
        is_list = get_origin(hint) not in (Union, UnionType) and get_origin(hint) is tuple
        return set().union(*map(forms, get_args(hint))) | ({list} if is_list else set())
    return {hint} - {type(None), Ellipsis}


def wrong(section: str, name: str) -> Iterator[tuple[Any, bool]]:
    """Values of other types, and such as are out of range; whether each has to be refused."""
    found = forms(get_type_hints(SECTIONS[section])[name])
    yield {"x": {"y": 1}}, True
    yield [[["x"]]], True
    yield [3], True
    yield [], list not in found
    yield date(2020, 1, 2), True
    yield float("nan"), True
    yield float("inf"), True
    yield float("-inf"), True
    yield -1, True
    yield -0.5, True
    yield HUGE, True
    yield -HUGE, True
    yield 1e300, True
    yield 2**63, float not in found
    yield 2.5, float not in found
    yield 0, not found & {int, float}
    yield True, bool not in found
    yield "3", str not in found
    yield "os.system", str not in found
    yield "", str not in found
    yield "a\nb\x1b[31m\x7f", str not in found
    yield "a/../\u2028b", str not in found
    yield "x" * 300, str not in found
    yield "x" * 20_000, str not in found


def fails(path: Path, what: str) -> bool:
    """Whether a plan is refused, and in one line."""
    try:
        read_plan(path)
    except (SettingsError, DataError) as error:
        assert error.exit_code in (1, 2)
        assert len(str(error).splitlines()) == 1, what
        assert "\x1b" not in str(error), what
        assert path.name in str(error), what
        return True
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {str(error)[:60]}")
    return False


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with what a plan names."""
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n')
    return tmp_path


def test_the_plan_itself_is_right(place: Path) -> None:
    (place / "plan.toml").write_text(plan_text("train", {}))
    assert read_plan(place / "plan.toml").tasks[0].data == (str(place / "rows.jsonl"),)


@pytest.mark.parametrize(("section", "name"), NAMES)
def test_every_field_wrong_in_every_way_is_one_line(place: Path, section: str, name: str) -> None:
    path = place / "plan.toml"
    refused = 0
    for value, must_fail in wrong(section, name):
        path.write_text(plan_text(section, {name: value}))
        what = f"{section}.{name} = {str(value)[:40]!r}"
        failed = fails(path, what)
        assert failed or not must_fail, what
        refused += failed
    assert refused >= 13


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_fields_are_named(place: Path, section: str) -> None:
    path = place / "plan.toml"
    for name in ("surprise", "Rank", "", "a.b", "learning-rate", "a\nb\x1b[31m"):
        path.write_text(plan_text(section, {name: 1}))
        assert fails(path, name)
        with pytest.raises(SettingsError, match="unknown"):
            read_plan(path)


@pytest.mark.parametrize("name", ["model", "watch", "tasks", *list(SECTIONS)[:-1]])
def test_every_part_wrong_in_every_way_is_one_line(place: Path, name: str) -> None:
    path = place / "plan.toml"
    values: list[Any] = [3, 2.5, True, float("nan"), [3], [["x"]], "text", date(2020, 1, 2), HUGE, "x" * 20_000]
    for value in values:
        rest = {"model": "base", "tasks": [dict(TASK)]} | {name: value}
        path.write_text("".join(f"{key} = {toml(item)}\n" for key, item in rest.items()))
        texts = name in ("model", "watch") and isinstance(value, str)
        assert fails(path, f"{name} = {str(value)[:40]!r}") or texts


@pytest.mark.parametrize("key", list(TASK))
def test_a_task_says_what_it_has_to(place: Path, key: str) -> None:
    task = {name: value for name, value in TASK.items() if name != key}
    (place / "plan.toml").write_text(f'model = "base"\ntasks = [{toml(task)}]\n')
    with pytest.raises(SettingsError, match=f"task 1 has no {key}"):
        read_plan(place / "plan.toml")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e999", "[[1]]", "{x = 1}", "2020-01-02", "'a\tb'", "\x00"])
@pytest.mark.parametrize("section", list(SECTIONS)[:-1])
def test_overrides_wrong_in_every_way_are_one_line(place: Path, section: str, value: str) -> None:
    path = place / "plan.toml"
    path.write_text(plan_text(section, {}))
    for field in fields(SECTIONS[section]):
        try:
            read_plan(path, [f"{section}.{field.name}={value}"])
        except SculptorError as error:
            assert len(str(error).splitlines()) == 1, field.name
        else:
            found = forms(get_type_hints(SECTIONS[section])[field.name])
            assert str in found, field.name
