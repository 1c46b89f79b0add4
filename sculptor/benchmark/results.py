"""What `continual` says of a sequence of tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from sculptor.benchmark.plan import Contender, Plan, Split
from sculptor.data.rows import names_of
from sculptor.evaluation.matrix import ContinualMetrics, continual_metrics
from sculptor.validation import STRICT, Count, Finite, Name, NotNegative, Share

# Keys of a plan whose values are paths.
_PATHS = ("model", "chat_template")
_DATA = ("data", "test", "validation", "watch")


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task after one stage; what does not apply is None."""

    __pydantic_config__ = STRICT

    accuracy: Share | None
    exact_match: Share | None
    loss: Finite


@dataclass(frozen=True, slots=True)
class Stage:
    """The state after one training, or the base.

    Attributes:
        name: the task that was learned; "base" for the first.
        scores: by task, all of them.
        watch_loss: mean loss per token on all watched texts, None without; `watched` that of each.
        archive_bytes: size of the archive for the next task, None without.
        seconds: training and carrying the archive on.
    """

    __pydantic_config__ = STRICT

    name: Name
    scores: Mapping[Name, TaskScore]
    watch_loss: Finite | None
    archive_bytes: Count | None
    seconds: NotNegative
    watched: Mapping[Name, Finite] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scores:
    """scores.json: the stages so far, and what has to be the same for a run to go on behind them."""

    __pydantic_config__ = STRICT

    key: Mapping[str, JsonValue]
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class ContinualReport:
    """The result of `continual`.

    Attributes:
        metric: what the matrix is made of: accuracy, exact_match, or loss (negative, so that more is better).
        matrix: R, the base first, a column per task.
        watch_rise: of the loss on the watched texts, from the base to the end.
    """

    output: Path
    method: str
    basis: str | None
    split: str
    seed: int
    tasks: tuple[str, ...]
    metric: str
    matrix: tuple[tuple[float, ...], ...]
    metrics: ContinualMetrics
    watch_rise: float | None
    stages: tuple[Stage, ...]


def report_of(
    plan: Plan, method: Contender, basis: str, split: Split, stages: Sequence[Stage], output: Path
) -> ContinualReport:
    """The figures of a finished run, the base's stage first."""
    names = tuple(task.name for task in plan.tasks)
    everything = [score for stage in stages for score in stage.scores.values()]
    metric = next(
        (name for name in ("accuracy", "exact_match") if all(getattr(s, name) is not None for s in everything)), "loss"
    )
    sign = -1 if metric == "loss" else 1
    matrix = tuple(tuple(sign * getattr(stage.scores[name], metric) for name in names) for stage in stages)
    first, last = stages[0].watch_loss, stages[-1].watch_loss
    return ContinualReport(
        output=output,
        method=method,
        basis={"sculptor": basis, "random": "random"}.get(method),
        split=split,
        seed=plan.train.seed,
        tasks=names,
        metric=metric,
        matrix=matrix,
        metrics=continual_metrics(matrix),
        watch_rise=None if first is None or last is None else last - first,
        stages=tuple(stages),
    )


def plain(report: ContinualReport) -> dict[str, Any]:
    """As plain values."""
    return asdict(report) | {"output": str(report.output)}


def different(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what differs, as `section.name`."""
    names = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            names += [f"{name}.{inner}" for inner in value if old.get(inner) != value[inner]]
        elif old != value:
            names.append(name)
    return sorted(names)


def published(value: Any, name: str = "") -> Any:
    """What a report says of a plan: names of files, no folders."""
    if isinstance(value, dict):
        return {key: published(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [published(item, name) for item in value]
    if name in _DATA and isinstance(value, str):
        return names_of(value)[0]
    return Path(value).name if name in _PATHS and isinstance(value, str) else value
