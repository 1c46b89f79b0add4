"""Several data in given shares: how much of an epoch is whose."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of consecutive runs of examples.

    An epoch ends when the data that are scarcest for their share have been seen once; of the others the next epoch takes
    examples that have not been seen yet.

    Attributes:
        sizes: how many examples each of the data has.
        weights: their shares, up to a factor.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Examples of an epoch, of each."""
        scarcest = min(size / weight for size, weight in zip(self.sizes, self.weights, strict=True))
        return tuple(
            min(size, max(1, round(scarcest * weight))) for size, weight in zip(self.sizes, self.weights, strict=True)
        )

    @property
    def num_epoch(self) -> int:
        """Examples of an epoch."""
        return sum(self.counts)

    def rows(self, epoch: int, seed: int) -> list[int]:
        """The examples of an epoch, by their place among all; none twice."""
        found, start = [], 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            found += [start + i for i in _take(size, count, epoch, f"{seed} {number}")]
            start += size
        return found

    def mean(self, values: list[int]) -> float:
        """Mean of a figure of the examples, as an epoch has them."""
        total, start = 0.0, 0
        for size, count in zip(self.sizes, self.counts, strict=True):
            total += count * sum(values[start : start + size]) / size
            start += size
        return total / self.num_epoch


def _take(size: int, count: int, epoch: int, seed: str) -> list[int]:
    """`count` of `size`, shuffled, going on from epoch to epoch; anew where fewer than that are left."""
    per_round = size // count  # epochs that one order lasts for
    order = list(range(size))
    random.Random(f"{seed} {epoch // per_round}").shuffle(order)
    start = epoch % per_round * count
    return order[start : start + count]
