"""The processes that work on one run. There is one for now: several are refused before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all: where one is assumed, this is asked."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size} processes")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what all do; the parts of all ranks together are the whole, each item once."""
        return items[self.rank :: self.size] if self.size > 1 else items

    def total(self, number: int) -> int:
        """The sum over processes."""
        self._alone()
        return number

    def norm(self, norm: Tensor) -> Tensor:
        """The norm over processes, given that of this one's part."""
        self._alone()
        return norm

    def _alone(self) -> None:
        if self.size > 1:
            raise NotImplementedError("sums over several processes")
