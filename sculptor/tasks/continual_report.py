"""What `continual` says of a sequence of tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sculptor.evaluation.matrix import ContinualMetrics


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task after one stage; what does not apply is None."""

    accuracy: float | None
    exact_match: float | None
    loss: float


@dataclass(frozen=True, slots=True)
class Stage:
    """The state after one training, or the base.

    Attributes:
        name: the task that was learned; "base" for the first.
        scores: by task, all of them.
        general_loss: mean loss per token on the general texts, None without.
        archive_bytes: size of the archive for the next task, None without.
        seconds: training and carrying the archive on.
    """

    name: str
    scores: Mapping[str, TaskScore]
    general_loss: float | None
    archive_bytes: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class ContinualReport:
    """The result of `continual`.

    Attributes:
        metric: what the matrix is made of: accuracy, exact_match, or loss (negative, so that more is better).
        matrix: R, the base first, a column per task.
        general_rise: of the loss on the general texts, from the base to the end.
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
    general_rise: float | None
    stages: tuple[Stage, ...]
