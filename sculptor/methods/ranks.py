"""How many directions of each matrix are protected: the paper's adaptive rank.

    r = mrr + I (trr - mrr),  k = floor(r min(m, n))

I is a matrix's mean cosine similarity between input and output, divided by the mean over all matrices. Where the
text of arXiv 2504.07097 leaves it open: if in and out differ in size, the cosine is that of the residual stream
into and out of the block; I below 0 gives mrr; without data I is 1 everywhere; one direction always stays free.
"""

import math
from collections.abc import Mapping


def normalize_importance(cosines: Mapping[str, float]) -> dict[str, float]:
    """Divides by the mean, so that importance is 1 on average; a mean of 0 or less gives 1 everywhere."""
    mean = sum(cosines.values()) / len(cosines)
    return {name: value / mean if mean > 0 else 1.0 for name, value in cosines.items()}


def adaptive_retention(importance: float, minimum: float, target: float) -> float:
    """The paper's r; importance below 0 gives `minimum`."""
    return minimum + max(0.0, importance) * (target - minimum)


def protected_count(retention: float, shape: tuple[int, int]) -> int:
    """k = floor(r min(m, n)), at most all but one.

    A product within 1e-9 below a whole number counts as it: 0.29 of 100 is 29, not 28.
    """
    d = min(shape)
    return max(0, min(d - 1, math.floor(retention * d + 1e-9)))
