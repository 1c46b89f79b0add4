"""A mean over units and how sure it is: against the textbook, and against drawing again and again."""

import math
import statistics

import numpy as np
import pytest

from sculptor.numerics.ratio import Z95, ratio_of_sums


def test_with_one_each_it_is_the_mean_and_its_usual_error() -> None:
    values = [1.0, 4.0, 2.0, 2.5, -3.0]
    found = ratio_of_sums(values, [1] * 5)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert (found.low, found.high) == (found.mean - Z95 * found.error, found.mean + Z95 * found.error)
    assert pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-6) == Z95


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Units of other lengths, whose means differ: 95 % of 2,000 intervals, up to 2.5 standard errors of that share."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        counts = random.integers(1, 40, 80)
        sums = counts * (0.3 + random.normal(0, 0.2, 80)) + random.normal(0, 1, 80) * np.sqrt(counts)
        found = ratio_of_sums(list(sums), list(map(int, counts)))
        held += found.low <= 0.3 <= found.high
    assert abs(held / 2000 - 0.95) < 0.0125


def test_one_unit_says_nothing_of_its_error_and_none_is_refused() -> None:
    assert ratio_of_sums([3.0], [2]) == (1.5, math.inf)
    for sums, counts in (([], []), ([1.0], [0]), ([1.0], [1, 1])):
        with pytest.raises(ValueError, match="expected as many"):
            ratio_of_sums(sums, counts)
