"""PLAN.toml: a model, how to protect and train it, and a sequence of tasks."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sculptor.analysis.settings import SELF, AnalyzeSettings
from sculptor.data.examples import MIN_MAX_LENGTH
from sculptor.errors import DataError, SettingsError
from sculptor.training.settings import TrainSettings

Method = Literal["sculptor", "random", "full", "joint", "lora", "olora", "osf"]
METHODS: tuple[Method, ...] = ("sculptor", "random", "full", "joint", "lora", "olora", "osf")
Split = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings:
    """How every stage is evaluated."""

    max_length: int | None = None
    """Longest sequence in tokens; default 1024 or the model's limit."""
    batch_size: int = 32
    """Rows per forward."""
    exact_match: bool = True
    """Also generate greedily and compare; takes longest."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"batch_size {self.batch_size}: expected at least 1")
        if self.max_length is not None and self.max_length < MIN_MAX_LENGTH:
            raise SettingsError(f"max_length {self.max_length}: expected at least {MIN_MAX_LENGTH}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSettings:
    """What the compared methods of PEFT are told."""

    rank: int = 8
    """Rank of LoRA and O-LoRA."""
    alpha: int = 16
    """Their scale."""
    orthogonality: float = 0.5
    """O-LoRA's lambda: weight of the overlap with the A of earlier tasks."""
    preserve: float = 0.5
    """OSF's share of frozen singular directions."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or self.orthogonality < 0 or not 0 < self.preserve < 1:
            raise SettingsError(
                f"rank {self.rank}, alpha {self.alpha}, orthogonality {self.orthogonality}, preserve {self.preserve}: expected "
                "at least 1, more than 0, at least 0, and a share between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """One task of the sequence; its own epochs and learning rate go before the plan's."""

    name: str
    data: tuple[str, ...]
    test: tuple[str, ...]
    validation: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    epochs: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A plan with everything filled in.

    Attributes:
        model: checkpoint directory or hub name.
        tasks: in the order of training.
        general: text files whose loss is watched.
        analyze, train, evaluate, adapter: settings of these steps.
    """

    model: str
    tasks: tuple[PlannedTask, ...]
    general: tuple[str, ...]
    analyze: AnalyzeSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    adapter: AdapterSettings

    def train_settings(self, task: PlannedTask) -> TrainSettings:
        """The settings of one task."""
        own = {"epochs": task.epochs, "learning_rate": task.learning_rate}
        changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        if task.epochs is not None:
            changes["max_steps"] = None  # which would go before epochs
        return replace(self.train, **changes)

    def rows_of(self, task: PlannedTask, split: Split) -> tuple[str, ...]:
        """The files a task is evaluated on.

        Raises:
            SettingsError: if it has none of that split.
        """
        files = task.test if split == "test" else task.validation
        if not files:
            raise SettingsError(f"task {task.name}: no {split} files in the plan")
        return files

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def read_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Reads a plan; paths in it are relative to its own directory.

    Args:
        path: a TOML file.
        overrides: `section.name=value`, put in the place of what the plan says.

    Raises:
        DataError: if the file cannot be read.
        SettingsError: if it says something unknown, contradictory or too little.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such plan") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as cause:
        raise DataError(f"{path}: not a TOML file ({cause})") from cause
    for override in overrides:
        _override(content, override)
    known = {"model", "general", "analyze", "train", "evaluate", "adapter", "tasks"}
    _refuse_unknown(content, known, str(path))
    if not isinstance(content.get("model"), str):
        raise SettingsError(f'{path}: model is missing; expected model = "DIRECTORY"')
    tasks = content.get("tasks")
    if not isinstance(tasks, list) or not tasks:
        raise SettingsError(f"{path}: no tasks; expected [[tasks]] with name, data and test")
    place = path.resolve().parent
    parsed = tuple(_task(task, i, place, path) for i, task in enumerate(tasks, 1))
    names = [task.name for task in parsed]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SettingsError(f"{path}: two tasks are called {twice[0]}")
    analyze = _section(content, "analyze", path)
    if "data" in analyze:
        files = _strings(analyze["data"], f"{path} [analyze]: data")
        analyze["data"] = tuple(item if item == SELF else _locate(item, place) for item in files)
    plan = Plan(
        model=_locate(content["model"], place),
        tasks=parsed,
        general=tuple(_locate(item, place) for item in _strings(content.get("general", ()), f"{path}: general")),
        analyze=_settings(AnalyzeSettings, analyze, f"{path} [analyze]"),
        train=_settings(TrainSettings, _section(content, "train", path), f"{path} [train]"),
        evaluate=_settings(EvaluateSettings, _section(content, "evaluate", path), f"{path} [evaluate]"),
        adapter=_settings(AdapterSettings, _section(content, "adapter", path), f"{path} [adapter]"),
    )
    for i, task in enumerate(plan.tasks, 1):
        try:
            plan.train_settings(task)
        except SettingsError as error:
            raise SettingsError(f"{path}: task {i} ({task.name}): {error}") from error
    return plan


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not section:
        raise SettingsError(f"--set {override!r}: expected section.name=value, like train.learning_rate=3e-4")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word
    if not dot:
        content[section] = value
        return
    part = content.setdefault(section, {})
    if not isinstance(part, dict):
        raise SettingsError(f"--set {override!r}: {section} is no section; a task's own values stand in the plan")
    part[key] = value


def _section(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = content.get(name, {})
    if not isinstance(section, dict):
        raise SettingsError(f"{path}: {name} is not a section; write [{name}]")
    return dict(section)


def _settings(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """A settings class from a section, each value checked against the type of its field."""
    hints = get_type_hints(cls)
    _refuse_unknown(values, set(hints), where)
    checked = {name: _value(value, hints[name], f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**checked)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def _value(value: Any, hint: Any, where: str) -> Any:
    """A TOML value as a field's type has it: one string for several, an integer for a float.

    Raises:
        SettingsError: if it is of another type.
    """
    choices = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    for choice in choices:
        if get_origin(choice) is tuple:
            return _strings(value, where)
        if get_origin(choice) is Literal and value in get_args(choice):
            return value
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(choice, type) and type(value) is choice:
            return value
    names = [
        str(getattr(c, "__name__", c)) if get_origin(c) is None else " or ".join(map(repr, get_args(c)))
        for c in choices
    ]
    expected = " or ".join(name for name in names if name != "NoneType")
    raise SettingsError(f"{where} is {value!r}; expected {expected}")


def _strings(value: Any, where: str) -> tuple[str, ...]:
    """One string or a list of them."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(item, str) for item in listed):
        raise SettingsError(f"{where} is {value!r}; expected a string or a list of strings")
    return tuple(listed)


def _task(values: Any, number: int, place: Path, path: Path) -> PlannedTask:
    where = f"{path}: task {number}"
    if not isinstance(values, dict):
        raise SettingsError(f"{where} is no table; write [[tasks]]")
    missing = [key for key in ("name", "data", "test") if key not in values]
    if missing:
        raise SettingsError(f"{where} has no {missing[0]}; expected name, data and test")
    if not isinstance(values["name"], str) or not values["name"].replace("-", "").replace("_", "").isalnum():
        raise SettingsError(f"{where}: name {values['name']!r} is to be of letters, digits, - and _")
    files = {
        key: tuple(_locate(item, place) for item in _strings(values[key], f"{where}: {key}"))
        for key in ("data", "test", "validation")
        if key in values
    }
    task: PlannedTask = _settings(PlannedTask, values | files, where)
    return task


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(f"{where}: unknown {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _locate(item: str, place: Path) -> str:
    """A path as written, seen from the plan; a hub name stays what it is."""
    found = place / item
    return str(found) if found.exists() else item
