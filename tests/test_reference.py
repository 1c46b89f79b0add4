"""The library's reference has every public name, and says all of each. That it builds without warnings: .ci/run."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import sculptor

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")}
LISTED = [name for page in PAGES.values() for name in re.findall(r"^::: (\S+)$", page, re.M)]
FUNCTIONS = {name: found for name in sculptor.__all__ if isinstance(found := getattr(sculptor, name), FunctionType)}
SETTINGS = [name for name in sculptor.__all__ if dataclasses.is_dataclass(getattr(sculptor, name)) and name != "Kind"]


def classes_in(hint: object) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for part in typing.get_args(hint):
        yield from classes_in(part)


def returned() -> set[type]:
    """Classes of ours that functions return, and that are in what they return."""
    found: set[type] = set()
    waiting = [typing.get_type_hints(function).get("return") for function in FUNCTIONS.values()]
    while waiting:
        new = {each for each in classes_in(waiting.pop()) if each.__module__.startswith("sculptor.")} - found
        found |= new
        waiting += [
            hint for each in new if dataclasses.is_dataclass(each) for hint in typing.get_type_hints(each).values()
        ]
    return found


def said_of(text: str, section: str) -> str | None:
    """What a docstring has under a heading."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", text + "\n", re.M)
    return found and found[1]


def test_every_public_name_is_in_the_reference() -> None:
    assert len(LISTED) == len(set(LISTED))
    assert {f"sculptor.{name}" for name in sculptor.__all__} <= set(LISTED)
    named = set(re.findall(r"\bsculptor\.(\w+)", (ROOT / "docs" / "library.md").read_text(encoding="utf-8")))
    rooms = {path.stem for path in (ROOT / "sculptor").iterdir()}
    assert named - rooms <= set(sculptor.__all__)
    whole = {f"{each.__module__}.{each.__name__}" for each in returned()}
    public = {f"sculptor.{name}" for name in sculptor.__all__}
    homes = {f"{getattr(sculptor, name).__module__}.{name}" for name in sculptor.__all__ if name != "__version__"}
    modules = {name for name in LISTED if name.count(".") > 1 and name.rpartition(".")[2].islower()}
    missing = {name for name in whole - set(LISTED) - homes if name.rpartition(".")[0] not in modules}
    assert missing == set(), "returned, and not in docs/reference"
    assert all(name in public or name.count(".") > 1 or name == "sculptor.errors" for name in LISTED)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_gives_and_refuses(name: str) -> None:
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    arguments = re.findall(r"^    (\w+): \S", said_of(text, "Args") or "", re.M)
    assert arguments == list(inspect.signature(function).parameters)
    assert said_of(text, "Returns")
    assert said_of(text, "Raises") or name == "parameter_groups"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_text(name: str) -> None:
    """The string under the field, which is its help, too."""
    settings = getattr(sculptor, name)
    source = inspect.getsource(settings)
    for field in dataclasses.fields(settings):
        assert re.search(rf'^    {field.name}: .*(?:\n    \).*|\n        .*)*\n    """\S', source, re.M), field.name


def test_every_field_of_what_is_returned_is_explained() -> None:
    missing = [
        f"{each.__name__}.{field.name}"
        for each in returned()
        if dataclasses.is_dataclass(each)
        for field in dataclasses.fields(each)
        if not re.search(rf"\b{field.name}\b", said_of(inspect.getdoc(each) or "", "Attributes") or "")
    ]
    assert missing == []
