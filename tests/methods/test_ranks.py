"""The adaptive rank and its undefined cases."""

import pytest

from sculptor import AnalyzeSettings
from sculptor.errors import SettingsError
from sculptor.methods.kinds import make_method
from sculptor.methods.ranks import adaptive_retention, normalize_importance, protected_count


def test_retention_is_the_paper_s_formula() -> None:
    assert adaptive_retention(1.0, 0.1, 0.8) == pytest.approx(0.8)
    assert adaptive_retention(0.5, 0.1, 0.8) == pytest.approx(0.45)
    assert adaptive_retention(-0.3, 0.1, 0.8) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("retention", "shape", "k"),
    [(0.5, (7, 9), 3), (0.29, (100, 200), 29), (1.7, (8, 8), 7), (1.0, (5, 9), 4), (0.0, (5, 5), 0), (0.9, (1, 4), 0)],
)
def test_one_direction_always_stays_free(retention: float, shape: tuple[int, int], k: int) -> None:
    assert protected_count(retention, shape) == k


def test_importance_has_mean_1() -> None:
    found = normalize_importance({"a": 0.2, "b": 0.6, "c": -0.2})
    assert sum(found.values()) / 3 == pytest.approx(1.0)
    assert normalize_importance({"a": -0.5, "b": 0.1}) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preserve": 1.5}, r"--preserve 1\.5: expected at most 1"),
        ({"preserve": -0.1}, "--preserve -0.1"),
        ({"preserve": 1.0}, "--preserve 1: no direction would be left"),
        ({"preserve": float("nan")}, "--preserve nan"),
        ({"preserve": 0.5, "data": ("x",)}, "--data without effect"),
        ({"preserve": 0.5, "min_retention": 0.2}, "--min-retention without effect"),
        ({"min_retention": 0.9}, "--min-retention 0.9 is above --target-retention 0.8"),
        ({"target_retention": 2}, "--target-retention 2"),
    ],
)
def test_contradictions_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_method(AnalyzeSettings(**wrong))  # type: ignore[arg-type]
