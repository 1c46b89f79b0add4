"""The four figures of a continual run against hand computation and against each other."""

import pytest
import torch

from sculptor.evaluation.matrix import ContinualMetrics, continual_metrics

# Base, then after each of three tasks.
SCORES = [
    [0.10, 0.20, 0.30],
    [0.80, 0.25, 0.20],
    [0.70, 0.90, 0.40],
    [0.60, 0.85, 1.00],
]


def test_figures_of_three_tasks_by_hand() -> None:
    found = continual_metrics(SCORES)
    assert found.average == pytest.approx((0.60 + 0.85 + 1.00) / 3)
    assert found.learning == pytest.approx((0.80 + 0.90 + 1.00) / 3)
    assert found.backward == pytest.approx(((0.60 - 0.80) + (0.85 - 0.90)) / 2)
    assert found.forward == pytest.approx(((0.25 - 0.20) + (0.40 - 0.30)) / 2)


@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
def test_average_is_learning_plus_forgetting(tasks: int, generator: torch.Generator) -> None:
    for _ in range(10):
        scores = torch.randn(tasks + 1, tasks, dtype=torch.float64, generator=generator).tolist()
        found = continual_metrics(scores)
        assert found.backward is not None
        assert found.learning is not None
        assert found.average == pytest.approx(found.learning + (tasks - 1) / tasks * found.backward, abs=1e-12)


def test_nothing_forgotten_and_nothing_gained() -> None:
    rows = [[0.5, 0.5, 0.5, 0.5]] * 5
    assert continual_metrics(rows) == ContinualMetrics(0.5, 0.0, 0.5, 0.0)


def test_what_comes_before_a_task_is_no_forgetting() -> None:
    """Only the diagonal and the last row decide forgetting."""
    changed = [row.copy() for row in SCORES]
    changed[1][1] = changed[1][2] = changed[2][2] = changed[0][0] = changed[2][0] = -5.0
    before, after = continual_metrics(SCORES), continual_metrics(changed)
    assert (before.average, before.backward, before.learning) == (after.average, after.backward, after.learning)


def test_learned_together_has_an_average_only() -> None:
    assert continual_metrics(SCORES[:2]) == ContinualMetrics(pytest.approx((0.80 + 0.25 + 0.20) / 3), None, None, None)


def test_one_task_has_no_transfer() -> None:
    assert continual_metrics([[0.2], [0.9]]) == ContinualMetrics(0.9, None, 0.9, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SCORES[:3], r"expected 4 or 2 rows of 3 scores, got \[3, 3, 3\]"),
        ([*SCORES, SCORES[0]], "expected 4 or 2 rows of 3 scores"),
        (SCORES[:1], "expected 4 or 2 rows"),
        ([[0.1, 0.2, 0.3], [0.1, 0.2]], r"expected 3 or 2 rows of 2 scores, got \[3, 2\]"),
        ([[], []], "expected 1 or 2 rows of 0 scores"),
    ],
)
def test_another_shape_is_refused(wrong: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continual_metrics(wrong)
