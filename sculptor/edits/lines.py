"""LiNeS, layer-increasing network scaling (Wang et al. 2025, arXiv 2410.17146): shallow layers give back more than deep ones.

    W = W0 + lambda(l) (W1 - W0),    lambda(l) = alpha + beta l / (L - 1)

l is a block's position among the L of its stack: an encoder and a decoder are one stack each. What is outside of the
blocks takes alpha. For one task, as here, beta is 1 - alpha: the last block keeps everything.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sculptor.edits.difference import Where, blend


def scaling(depth: float | None, alpha: float, beta: float | None = None) -> float:
    """lambda.

    Args:
        depth: l / (L - 1), None outside of the blocks.
        alpha: of the first block.
        beta: what the last block has more; default 1 - alpha.
    """
    return alpha + (1 - alpha if beta is None else beta) * (depth or 0.0)


def lines(base: Tensor, tuned: Tensor, depth: float | None, alpha: float, beta: float | None = None) -> Tensor:
    """W0 + lambda (W1 - W0), float64."""
    return blend(base.double(), tuned.double(), scaling(depth, alpha, beta))


@dataclass(frozen=True, slots=True)
class Layered:
    """`lines` as an edit: a share for each block."""

    by_entry: ClassVar[bool] = True

    alpha: float
    beta: float | None = None

    def is_sliced(self, name: str, shape: tuple[int, ...]) -> bool:
        """Never."""
        return False

    def factor(self, where: Where) -> float:
        """lambda(l)."""
        return scaling(where.place.depth, self.alpha, self.beta)

    def kept(self, where: Where, base: Tensor, difference: Tensor) -> Tensor:
        """All of it."""
        return difference
