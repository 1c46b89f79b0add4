"""What `continual` says of a sequence of tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from sculptor.benchmark.plan import Contender, Plan, Split
from sculptor.checkpoint.reader import find_directory
from sculptor.data.rows import names_of, weight_of
from sculptor.evaluation.matrix import ContinualMetrics, continual_metrics
from sculptor.jobs.readme import Readme, code, listed
from sculptor.jobs.train_record import harm_figures
from sculptor.model.harm import Harm
from sculptor.validation import STRICT, Count, Finite, Name, NotNegative, Share

# Keys of a plan whose values are paths.
_PATHS = ("model", "chat_template", "like")
_DATA = ("data", "test", "validation", "watch", "replay")


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task after one stage; what does not apply is None.

    Attributes:
        accuracy: share of rows whose own label ranks first.
        exact_match: share of rows of which greedy generation gives a right answer.
        loss: nats a token.
    """

    __pydantic_config__ = STRICT

    accuracy: Share | None
    exact_match: Share | None
    loss: Finite


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one model; as in `Stage`."""

    scores: Mapping[str, TaskScore]
    watch_loss: float | None
    watched: Mapping[str, float]
    harm: Harm | None


@dataclass(frozen=True, slots=True)
class Stage:
    """The state after one training, or the base.

    Attributes:
        name: the task that was learned; "base" for the first.
        scores: by task, all of them.
        watch_loss: mean loss per token on all watched texts, None without; `watched` that of each.
        archive_bytes: size of the archive for the next task, None without.
        seconds: training and carrying the archive on.
        update: norm of everything that the training changed, None for the base.
        harm: KL(base || this) on samples of the base that nothing depended on; None if there are none.
        peak_bytes: most memory of the GPU at a time while it was trained and carried on, as torch counts it; None on a CPU.
    """

    __pydantic_config__ = STRICT

    name: Name
    scores: Mapping[Name, TaskScore]
    watch_loss: Finite | None
    archive_bytes: Count | None
    seconds: NotNegative
    watched: Mapping[Name, Finite] = field(default_factory=dict)
    update: NotNegative | None = None
    harm: Harm | None = None
    peak_bytes: Count | None = None


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
        output: directory of the run.
        method: as `--method` has it; `basis` of our own archives, None of other methods.
        split: which files of the tasks were evaluated, test or validation.
        seed: of the run.
        tasks: their names, in order.
        metric: what the matrix is made of: accuracy, exact_match, or loss (negative, so that more is better).
        matrix: R, the base first, a column per task.
        metrics: AA, BWT, LA and FWT of it.
        stages: what was measured of every model, the base first.
        watch_rise: of the loss on the watched texts, from the base to the end.
        harm: KL(base || last) in nats a token on samples of the base that nothing depended on; None if there are none.
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
    harm: Harm | None = None


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
        harm=stages[-1].harm,
    )


def plain(report: ContinualReport) -> dict[str, Any]:
    """As plain values."""
    return asdict(report) | {"output": str(report.output)}


def continual_readme(plan: Plan, report: ContinualReport) -> Readme:
    """What the model card of the last checkpoint tells: of all tasks, not of the last alone."""
    how = "within what a subspace archive leaves free" if report.basis or report.method == "sculptor" else report.method
    kept = "no rows of earlier tasks were kept" if report.method != "replay" else "with rows of earlier ones mixed in"
    return Readme(
        bases=(find_directory(plan.model),),
        done=f"taught {listed(report.tasks)}",
        summary=_summary(report, how, kept),
        tags=("continual-learning",),
        figures=_figures(report),
        data=tuple(name for task in plan.tasks for name in names_of(task.data)),
    )


def _summary(report: ContinualReport, how: str, kept: str) -> str:
    count = len(report.tasks)
    if report.method == "joint":
        return f"Fine-tuned on {count} tasks at once."
    if report.method == "slm":
        return f"Fine-tuned on the last of {count} tasks; what each changed is in the bank beside it, for the base."
    return f"Fine-tuned on {count} tasks, one after another, {how}; {kept}."


def _figures(report: ContinualReport) -> list[tuple[str, str]]:
    scale, unit = (-1, "nats per token") if report.metric == "loss" else (100, "%")
    what, metrics, harm = report.metric.replace("_", " "), report.metrics, report.harm
    first, last = report.matrix[0], report.matrix[-1]
    rise = [] if report.watch_rise is None else [("rise of the loss on watched text", f"{report.watch_rise:+.4f}")]
    return [
        *(
            (f"{what} of {code(name)}, base and now", f"{scale * before:.3f}, {scale * now:.3f} {unit}")
            for name, before, now in zip(report.tasks, first, last, strict=True)
        ),
        ("average", f"{scale * metrics.average:.3f} {unit}"),
        *([] if metrics.backward is None else [("backward transfer", f"{abs(scale) * metrics.backward:+.3f}")]),
        *rise,
        *([] if harm is None else harm_figures(harm)),
    ]


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
        weight = weight_of(value)
        return names_of(value)[0] + ("" if weight is None else f":{weight:g}")  # two plans may differ by it alone
    if name == "protect" and isinstance(value, str):
        return f"{value.partition('=')[0]}={names_of(value.partition('=')[2])[0]}"
    return Path(value).name if name in _PATHS and isinstance(value, str) else value
