"""A hard threshold on the singular values of a difference (DG-Hard, arXiv 2605.20296; Donoho and Gavish 2014, arXiv 1305.5870).

    tau = omega(b) median(sigma),    omega(b) = 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43,    b = min(m, n) / max(m, n)

Below tau lies what noise of the median's size makes, whatever that size is; what stays is the low-rank signal above it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sculptor.edits.difference import Where
from sculptor.numerics.linalg import singular_subspaces


def omega(ratio: float) -> float:
    """The threshold over the median, for b = min(m, n) / max(m, n) (Donoho and Gavish's fit, off by at most 0.02)."""
    return 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43


def threshold(difference: Tensor) -> Tensor:
    """The difference without its singular directions below tau, float64.

    Args:
        difference: (m, n), any floating dtype.

    Raises:
        ValueError: if it is no matrix.
    """
    m, n = difference.shape
    difference64 = difference.to(torch.float64)
    left, values, _ = singular_subspaces(difference64, min(m, n))
    count = int((values >= omega(min(m, n) / max(m, n)) * values.quantile(0.5)).sum())
    if count == min(m, n):
        return difference64
    kept = left[:, :count]
    return kept @ (kept.T @ difference64)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has singular values to speak of."""
    return len(shape) == 2 and min(shape) > 1


@dataclass(frozen=True, slots=True)
class Denoised:
    """`threshold` as an edit, and a share of what it leaves."""

    by_entry: ClassVar[bool] = False

    alpha: float = 1.0

    def is_sliced(self, name: str, shape: tuple[int, ...]) -> bool:
        """Stacks of matrices: experts."""
        return len(shape) == 3 and is_matrix(shape[1:])

    def factor(self, where: Where) -> float:
        """Alpha, everywhere."""
        return self.alpha

    def kept(self, where: Where, base: Tensor, difference: Tensor) -> Tensor:
        """What is above tau; all of what is no matrix."""
        return threshold(difference) if is_matrix(tuple(difference.shape)) else difference
