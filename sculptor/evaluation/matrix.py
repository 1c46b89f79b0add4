"""The continual-learning matrix and what is read off it (Lopez-Paz and Ranzato 2017).

R[i][j] is the score on task j after task i was learned, R[0] that of the base, i = 1 ... T:

    AA  = mean_j R[T][j]                        what the model can do in the end
    BWT = mean_{j<T} R[T][j] - R[j][j]          backward transfer: forgetting, if negative
    LA  = mean_j R[j][j]                        learning accuracy: each task right after it was learned
    FWT = mean_{j>1} R[j-1][j] - R[0][j]        forward transfer: what earlier tasks gave to a later one

AA = LA + (T-1)/T BWT.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContinualMetrics:
    """The four figures of a sequence; None where it does not define them.

    Attributes:
        average: AA, the mean of the last row.
        backward: BWT, the mean change of a task from when it was learned to the end.
        learning: LA, the mean of tasks right after they were learned.
        forward: FWT, the mean change of a task before it was learned, by those before it.
    """

    average: float
    backward: float | None
    learning: float | None
    forward: float | None


def continual_metrics(scores: Sequence[Sequence[float]]) -> ContinualMetrics:
    """Figures of a matrix of scores.

    Args:
        scores: R as T + 1 rows (base first) of T columns; two rows for T > 1 columns if all tasks were learned
            together, which has an average only.

    Raises:
        ValueError: if it has another shape.
    """
    tasks = len(scores[-1])
    if any(len(row) != tasks for row in scores) or not tasks or len(scores) not in (2, tasks + 1):
        raise ValueError(f"expected {tasks + 1} or 2 rows of {tasks} scores, got {[len(row) for row in scores]}")
    average = sum(scores[-1]) / tasks
    if len(scores) != tasks + 1:
        return ContinualMetrics(average, None, None, None)
    learned = [scores[j + 1][j] for j in range(tasks)]
    later = range(1, tasks)
    return ContinualMetrics(
        average,
        backward=_mean([scores[-1][j] - learned[j] for j in range(tasks - 1)]),
        learning=_mean(learned),
        forward=_mean([scores[j][j] - scores[0][j] for j in later]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
