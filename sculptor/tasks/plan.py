"""PLAN.toml: a model, how to protect and train it, and a sequence of tasks."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from sculptor.analysis.settings import SELF, AnalyzeSettings
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
    analyze["data"] = tuple(item if item == SELF else _locate(item, place) for item in analyze.get("data", ()))
    return Plan(
        model=_locate(content["model"], place),
        tasks=parsed,
        general=tuple(_locate(item, place) for item in content.get("general", ())),
        analyze=_settings(AnalyzeSettings, analyze, "analyze", path),
        train=_settings(TrainSettings, _section(content, "train", path), "train", path),
        evaluate=_settings(EvaluateSettings, _section(content, "evaluate", path), "evaluate", path),
        adapter=_settings(AdapterSettings, _section(content, "adapter", path), "adapter", path),
    )


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


def _settings(cls: type[Any], values: Mapping[str, Any], name: str, path: Path) -> Any:
    _refuse_unknown(values, {field.name for field in fields(cls)}, f"{path} [{name}]")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except SettingsError as error:
        raise SettingsError(f"{path} [{name}]: {error}") from error
    except TypeError as error:
        raise SettingsError(f"{path} [{name}]: a value has the wrong type ({error})") from error


def _task(values: Any, number: int, place: Path, path: Path) -> PlannedTask:
    where = f"{path}: task {number}"
    if not isinstance(values, dict):
        raise SettingsError(f"{where} is no table; write [[tasks]]")
    _refuse_unknown(values, {field.name for field in fields(PlannedTask)}, where)
    missing = [key for key in ("name", "data", "test") if key not in values]
    if missing:
        raise SettingsError(f"{where} has no {missing[0]}; expected name, data and test")
    if not isinstance(values["name"], str) or not values["name"].replace("-", "").replace("_", "").isalnum():
        raise SettingsError(f"{where}: name {values['name']!r} is to be of letters, digits, - and _")
    chosen = dict(values)
    for key in ("data", "test", "validation"):
        files = chosen.get(key, [])
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, list) or not all(isinstance(item, str) for item in files):
            raise SettingsError(f"{where}: {key} is to be a file or a list of files")
        chosen[key] = tuple(_locate(item, place) for item in files)
    if chosen.get("labels") is not None:
        chosen["labels"] = tuple(map(str, chosen["labels"]))
    return PlannedTask(**chosen)


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(f"{where}: unknown {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _locate(item: str, place: Path) -> str:
    """A path as written, seen from the plan; a hub name stays what it is."""
    found = place / item
    return str(found) if found.exists() else item
