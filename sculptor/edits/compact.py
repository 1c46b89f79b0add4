"""A difference of two matrices in as few numbers as give it back: two factors where they are fewer, else as it is."""

from typing import NamedTuple

import torch
from torch import Tensor

from sculptor.numerics.rounding import rounding_variance

# Of the square of a difference, at most: a small one may be no larger than rounding, and still be all that was learned.
_LEFT_OUT = 0.01


class Compact(NamedTuple):
    """A difference: `left` (m, r) times `right` (r, n), float32, or `left` alone, all of it."""

    left: Tensor
    right: Tensor | None

    def whole(self) -> Tensor:
        """The difference, float64."""
        left = self.left.to(torch.float64)
        return left if self.right is None else left @ self.right.to(torch.float64)


def compact(base: Tensor, tuned: Tensor, rank: int | None = None) -> Compact:
    """tuned - base, but for what rounding to the dtype of `base` explains, at most a hundredth of its square.

    Args:
        base: W0, of any shape.
        tuned: W1.
        rank: at most, of matrices; None for as many as it takes.
    """
    difference = tuned.to(torch.float64) - base.to(torch.float64)
    whole = Compact(difference.to(torch.float32), None)
    if difference.ndim != 2:
        return whole
    m, n = difference.shape
    u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    tails = s.square().flip(0).cumsum(0).flip(0)  # what is left out where the rank is i
    allowed = torch.minimum(rounding_variance(tuned, [base.dtype]).sum(), _LEFT_OUT * s.square().sum())
    needed = int((tails > allowed).sum())
    kept = needed if rank is None else min(rank, needed)
    if kept * (m + n) >= m * n:
        return whole
    root = s[:kept].sqrt()
    return Compact(
        (u[:, :kept] * root).to(torch.float32).contiguous(), (root[:, None] * vh[:kept]).to(torch.float32).contiguous()
    )
