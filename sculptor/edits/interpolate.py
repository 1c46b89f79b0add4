"""Interpolating between a base and a fine-tune:  W = W0 + alpha (W1 - W0)  (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sculptor.edits.difference import Where, blend


def interpolate(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """W0 + alpha (W1 - W0), float64."""
    return blend(base.double(), tuned.double(), alpha)


@dataclass(frozen=True, slots=True)
class Even:
    """`interpolate` as an edit: the same share everywhere."""

    by_entry: ClassVar[bool] = True

    alpha: float

    def is_sliced(self, name: str, shape: tuple[int, ...]) -> bool:
        """Never."""
        return False

    def factor(self, where: Where) -> float:
        """Alpha."""
        return self.alpha

    def kept(self, where: Where, base: Tensor, difference: Tensor) -> Tensor:
        """All of it."""
        return difference
