"""PLAN.toml: a model, how to protect and train it, and a sequence of tasks."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field

from sculptor.data.examples import MIN_MAX_LENGTH
from sculptor.data.reference import locate
from sculptor.data.rows import given_twice
from sculptor.errors import DataError, SettingsError
from sculptor.methods.kinds import Kinds, known_kinds, make_method
from sculptor.methods.settings import DEFAULT_BLOCK, DEFAULT_ENERGY, DEFAULT_FREE, AnalyzeSettings, is_self
from sculptor.training.settings import EVIDENCE, TrainSettings
from sculptor.validation import AtLeastOne, ColumnNames, NotNegative, Positive, Share, Text, Texts, settings

T = TypeVar("T")
Contender = Literal[
    "sculptor", "random", "full", "joint", "replay", "l2", "kl", "interpolate", "eaft", "rescaled", "lines", "crispedit",
    "inflora", "sara", "orthsr", "bayes-adam", "esacl", "mamf", "slm", "lora", "olora", "osf",
]  # fmt: skip
CONTENDERS: tuple[Contender, ...] = get_args(Contender)
# Published systems that are rules of sculptor's own, and what of [adapter] they are told.
RULES_OF: Mapping[Contender, tuple[str, tuple[str, ...]]] = {
    "inflora": ("lowrank", ("rank", "energy")),
    "sara": ("mask", ("free",)),
    "orthsr": ("rotation", ("block_size",)),
}
Split = Literal["test", "validation"]


@settings
class EvaluateSettings:
    """How every stage is evaluated."""

    max_length: Annotated[int, Field(ge=MIN_MAX_LENGTH, le=2**31)] | None = None
    """Longest sequence in tokens; default 1024 or the model's limit."""
    batch_size: AtLeastOne | None = None
    """Rows per forward [default: 16, and on a GPU as many as go well]."""
    exact_match: bool = True
    """Also generate greedily and compare, answers of conversations, too; takes longest."""
    harm: bool = True
    """Also measure KL(base || new) on what the base says by itself."""


@settings
class AdapterSettings:
    """What the compared methods are told."""

    rank: AtLeastOne = 8
    """Rank of LoRA, O-LoRA, InfLoRA and SLM."""
    alpha: AtLeastOne = 16
    """Their scale."""
    orthogonality: NotNegative = 0.5
    """O-LoRA's lambda: weight of the overlap with the A of earlier tasks."""
    preserve: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """OSF's share of frozen singular directions."""
    energy: Annotated[float, Field(gt=0, le=1)] = DEFAULT_ENERGY
    """InfLoRA's threshold: share of a task's inputs that is protected after it."""
    free: Annotated[float, Field(gt=0, le=1)] = DEFAULT_FREE
    """SaRA's share of trained entries."""
    block_size: Annotated[int, Field(ge=2, le=2**31)] = DEFAULT_BLOCK
    """OrthSR's blocks of outputs."""
    replay: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of every epoch of replay that are rows of earlier tasks."""
    decay: Positive = 100.0
    """l2's pull towards where the task began, as weight decay of the update."""
    keep: Share = 0.5
    """Share of what a task changed that interpolate keeps, and lines in the first block and outside of blocks."""
    kl: NotNegative = 1.0
    """Weight of KL(base || new) in the loss of kl, and of OrthSR (0 for none), on the task's rows; the base is where it began."""
    evidence: Positive = EVIDENCE
    """bayes-adam's precision that a step adds, as `train --evidence`."""
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """EsaCL's share of every matrix that is pruned before a task, and trained in it."""
    select: Annotated[float, Field(gt=0, le=1)] = 0.5
    """EsaCL's share of a task's rows that are trained on."""
    episodes: AtLeastOne = 4
    """MAMF's sub-tasks before each task, for which half of its steps are taken."""
    ways: Annotated[int, Field(ge=2, le=2**31)] = 2
    """Labels of a sub-task."""
    like: Text | None = None
    """Output of the run whose updates' norms rescaled takes."""


@settings
class PlannedTask:
    """One task of the sequence; its own epochs and learning rate go before the plan's."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w-]+$")]
    """Letters, digits, - and _."""
    data: Texts
    """Rows that are trained on."""
    test: Texts
    """Files that are evaluated on."""
    validation: Texts = ()
    """Files to choose settings on."""
    labels: Texts | None = None
    """Completions to rank; default those of the rows."""
    columns: ColumnNames | None = None
    """Which columns of all these are which keys of ours, in the place of what [train] says."""
    epochs: Positive | None = None
    """In the place of the plan's."""
    learning_rate: Positive | None = None
    """In the place of the plan's."""
    relative_rate: Positive | None = None
    """In the place of the plan's."""


@settings
class Plan:
    """A plan with everything filled in."""

    model: Text
    """Checkpoint directory or hub name."""
    tasks: tuple[PlannedTask, ...]
    """In the order of training."""
    watch: Texts
    """Text files whose loss is watched."""
    analyze: AnalyzeSettings
    """Settings of the analysis."""
    train: TrainSettings
    """Settings of every training."""
    evaluate: EvaluateSettings
    """How every stage is evaluated."""
    adapter: AdapterSettings
    """What the compared methods are told."""
    replay: Texts = ()
    """Mixed into the rows of every task, as `train --replay` does."""

    def train_settings(self, task: PlannedTask) -> TrainSettings:
        """The settings of one task."""
        own = {name: getattr(task, name) for name in ("epochs", "columns", "learning_rate", "relative_rate")}
        changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        if task.learning_rate is not None or task.relative_rate is not None:
            changes = {"learning_rate": None, "relative_rate": None} | changes  # one of the two decides
        if task.epochs is not None:
            changes["max_steps"] = None  # which would go before epochs
        changed: TrainSettings = replace(self.train, **changes)
        return changed

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


def read_plan(path: str | Path, overrides: Sequence[str] = (), rules: Kinds | None = None) -> Plan:
    """Reads a plan; paths in it are relative to its own directory.

    Args:
        path: a TOML file.
        overrides: `section.name=value`, put in the place of what the plan says.
        rules: kinds of rules beside sculptor's own.

    Raises:
        DataError: if the file cannot be read.
        SettingsError: if it says something unknown, contradictory or too little.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such plan") from None
    except (OSError, ValueError, RecursionError) as cause:  # bytes, syntax, numbers without end, depth
        raise DataError(f"{path}: not a TOML file ({str(cause)[:160]})") from cause
    for override in overrides:
        _override(content, override)
    known = {"model", "watch", "analyze", "train", "evaluate", "adapter", "tasks", "replay"}
    if "general" in content:
        raise SettingsError(f"{path}: general is called watch")
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
        analyze["data"] = _data(analyze["data"], f"{path} [analyze]: data", place)
    if "protect" in analyze:
        named = (item.partition("=") for item in _strings(analyze["protect"], f"{path} [analyze]: protect"))
        analyze["protect"] = tuple(f"{name}{sign}{locate(item, place)}" for name, sign, item in named)
    adapter = _section(content, "adapter", path)
    if isinstance(adapter.get("like"), str):
        adapter["like"] = _locate(adapter["like"], place)
    parts = {
        "model": _locate(content["model"], place),
        "tasks": parsed,
        "watch": tuple(locate(item, place) for item in _strings(content.get("watch", ()), f"{path}: watch")),
        "analyze": _settings(AnalyzeSettings, analyze, f"{path} [analyze]"),
        "train": _settings(TrainSettings, _section(content, "train", path), f"{path} [train]"),
        "evaluate": _settings(EvaluateSettings, _section(content, "evaluate", path), f"{path} [evaluate]"),
        "adapter": _settings(AdapterSettings, adapter, f"{path} [adapter]"),
        "replay": _data(content.get("replay", ()), f"{path}: replay", place),
    }
    plan = _settings(Plan, parts, str(path))
    if plan.train.add_tokens:
        raise SettingsError(
            f"{path} [train]: add_tokens would be added by every task; make such a model first, by one `sculptor train`"
        )
    try:
        again = given_twice(plan.analyze.data)
        if again is not None:
            raise SettingsError(f"data {again!r} is given twice")
        make_method(plan.analyze, known_kinds(rules))
    except SettingsError as error:
        raise SettingsError(f"{path} [analyze]: {error}") from error
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
    except (ValueError, RecursionError):
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


def _settings(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A settings class from a section, each value checked against the type of its field."""
    _refuse_unknown(values, {field.name for field in fields(cls)}, where)  # type: ignore[arg-type]
    try:
        return cls(**values)
    except (SettingsError, TypeError) as error:
        text = re.sub(r"(^|; )--([a-z-]+)(?= )", lambda found: found[1] + found[2].replace("-", "_"), str(error))
        raise SettingsError(f"{where}: {text}") from error


def _strings(value: Any, where: str) -> tuple[str, ...]:
    """One string or a list of them."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(item, str) for item in listed):
        raise SettingsError(f"{where} is {value!r}; expected a string or a list of strings")
    return tuple(listed)


def _data(value: Any, where: str, place: Path) -> tuple[str, ...]:
    """Files seen from the plan, and `self`."""
    return tuple(item if is_self(item) else locate(item, place) for item in _strings(value, where))


def _task(values: Any, number: int, place: Path, path: Path) -> PlannedTask:
    where = f"{path}: task {number}"
    if not isinstance(values, dict):
        raise SettingsError(f"{where} is no table; write [[tasks]]")
    missing = [key for key in ("name", "data", "test") if key not in values]
    if missing:
        raise SettingsError(f"{where} has no {missing[0]}; expected name, data and test")
    files = {
        key: tuple(locate(item, place) for item in _strings(values[key], f"{where}: {key}"))
        for key in ("data", "test", "validation")
        if key in values
    }
    return _settings(PlannedTask, values | files, where)


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(f"{where}: unknown {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _locate(item: str, place: Path) -> str:
    """A path as written, seen from the plan; a hub name stays what it is."""
    found = place / item
    return str(found) if os.path.exists(found) else item  # unlike Path.exists, of any name
