"""A mean over tokens or rows that come in independent units, and how sure it is.

Of s_i over n_i tokens in unit i, N units, the mean is a ratio of sums, its standard error that of the ratio (Cochran 1977, 6.8):

    m = sum s_i / sum n_i        error = sqrt(N / (N - 1) sum (s_i - m n_i)^2) / sum n_i

With n_i = 1 that is the mean and its usual standard error.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959964  # of the normal distribution: 95 % are within so many standard errors


class Ratio(NamedTuple):
    """A mean, its standard error; infinite where one unit is all there is."""

    mean: float
    error: float

    @property
    def low(self) -> float:
        """Where the 95 % confidence interval begins."""
        return self.mean - Z95 * self.error

    @property
    def high(self) -> float:
        """Where it ends."""
        return self.mean + Z95 * self.error


def ratio_of_sums(sums: Sequence[float], counts: Sequence[float]) -> Ratio:
    """The mean of s_i over n_i, with its standard error.

    Raises:
        ValueError: if there is nothing, or not as many of both.
    """
    total, num = math.fsum(counts), len(sums)
    if num != len(counts) or not total > 0:
        raise ValueError(f"{num} sums over {len(counts)} counts of {total:g} in all: expected as many, and some")
    mean = math.fsum(sums) / total
    if num < 2:
        return Ratio(mean, math.inf)
    spread = math.fsum((found - mean * count) ** 2 for found, count in zip(sums, counts, strict=True))
    return Ratio(mean, math.sqrt(spread * num / (num - 1)) / total)
