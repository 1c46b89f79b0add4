"""Which pairs to freeze: those of the largest curvature, as a staircase of few steps.

The importance of the pair (i, j) is g_i c_j, with g and c the eigenvalues of the two moments. Freezing input
direction j in a group of rows costs as many pairs as there are rows and protects (sum of g_i) c_j, so the best
group freezes the columns where (mean of g_i) c_j is above one threshold. Row groups end at m/64, m/32, ..., m/2, m:
eigenvalues fall fast, and a few steps lose little (docs/benchmarks.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.numerics.staircase import Staircase, merge_steps

STEPS = 7


@dataclass(frozen=True, eq=False, slots=True)
class Importance:
    """What is known of one matrix (m, n) when its share is decided.

    Attributes:
        outputs: g (m,), descending, or None where every output direction counts the same.
        inputs: c (n,), descending.
        stored_outputs, stored_inputs: how many leading directions are told apart.
        scale: weight of the matrix against others, where one threshold serves all.
    """

    rows: int
    outputs: Tensor | None
    inputs: Tensor
    stored_outputs: int
    stored_inputs: int
    scale: float = 1.0

    @property
    def columns(self) -> int:
        """n."""
        return self.inputs.numel()

    def ends(self, steps: int) -> tuple[int, ...]:
        """Where the row groups end: m / 2^(steps - 1), ..., m / 2, as far as directions are stored, and m."""
        if self.outputs is None:
            return (self.rows,)
        halves = (max(1, round(self.rows / 2**power)) for power in range(steps - 1, 0, -1))
        return (*sorted({end for end in halves if end <= self.stored_outputs and end < self.rows}), self.rows)

    def group_means(self, steps: int) -> Tensor:
        """Mean importance of the output directions of every row group, float64."""
        if self.outputs is None:
            return torch.ones(1, dtype=torch.float64)
        outputs64 = self.outputs.to(torch.float64)
        ends = self.ends(steps)
        return torch.stack([outputs64[a:b].mean() for a, b in zip((0, *ends), ends, strict=False)])

    def levels(self, steps: int) -> Tensor:
        """Every importance a threshold can separate: (groups, stored inputs + 1), float64.

        The last column is that of all input directions that are not stored, which freeze together or not at all; in the
        last group, which has the unstored output directions, never.
        """
        inputs64 = self.inputs.to(torch.float64)
        rest = inputs64[self.stored_inputs :].mean() if self.stored_inputs < self.columns else inputs64.new_zeros(())
        kept = torch.cat([inputs64[: self.stored_inputs], rest[None]])
        levels = (self.group_means(steps) * self.scale)[:, None] * kept
        levels[-1, -1] = -torch.inf
        return levels

    def staircase(self, threshold: float, steps: int, levels: Tensor, rest_threshold: float | None = None) -> Staircase:
        """The pairs above a threshold, in groups of rows; directions that are not stored may have one of their own.

        Args:
            threshold: of importance.
            steps: how many row groups at most.
            levels: of as many, which are the same for every threshold.
            rest_threshold: of directions that are not stored.
        """
        above = levels[:, :-1] > threshold
        whole = above.all(dim=1) & (levels[:, -1] > (threshold if rest_threshold is None else rest_threshold))
        reaches = torch.where(whole, self.columns, above.sum(dim=1))
        reached = torch.cummin(reaches, dim=0).values.tolist()
        return Staircase(self.rows, self.columns, merge_steps(tuple(zip(self.ends(steps), reached, strict=True))))

    def protected_share(self, staircase: Staircase) -> float:
        """Share of the curvature sum(g) sum(c) in the frozen pairs."""
        inputs = self.inputs.to(torch.float64)
        ones = torch.ones(self.rows, dtype=torch.float64)
        outputs = ones if self.outputs is None else self.outputs.to(torch.float64)
        total = float(inputs.sum() * outputs.sum())
        frozen = sum(float(outputs[a:b].sum() * inputs[:reach].sum()) for a, b, reach in staircase.groups)
        return frozen / total if total > 0 else 0.0


def least_free_share(matrices: Sequence[Importance], steps: int = STEPS) -> float:
    """The share that stays free when every stored direction is frozen wherever it can be."""
    return _free_share([matrix.staircase(-1.0, steps, matrix.levels(steps)) for matrix in matrices])


def allocate(matrices: Sequence[Importance], budget: float, steps: int = STEPS) -> list[Staircase]:
    """Staircases of all matrices under one threshold, whose free share of all pairs is `budget`.

    Args:
        matrices: one for a threshold of its own, several for a common one.
        budget: free share, `least_free_share` to 1.
        steps: how many row groups at most.

    Returns:
        One staircase per matrix; together at least `budget` is free, more by less than one column of a group, or by
        the pairs whose importance is the same as the last one's.

    Raises:
        ValueError: if the stored directions cannot freeze as much.
    """
    levels = [matrix.levels(steps) for matrix in matrices]

    def at(threshold: float, rest_threshold: float | None) -> list[Staircase]:
        found = zip(matrices, levels, strict=True)
        return [matrix.staircase(threshold, steps, own, rest_threshold) for matrix, own in found]

    def lowest(rest_threshold: float | None) -> float:
        """The lowest threshold that leaves `budget` free."""
        low, high = 0, thresholds.numel() - 1  # nothing is above the last: all is free there
        while low < high:
            middle = (low + high) // 2
            if _free_share(at(float(thresholds[middle]), rest_threshold)) >= budget - 1e-9:
                high = middle
            else:
                low = middle + 1
        return float(thresholds[low])

    least = _free_share(at(-1.0, None))
    if not least - 1e-9 <= budget <= 1:
        raise ValueError(f"free share {budget} is not between {least:.3f}, which the stored directions allow, and 1")
    every = torch.cat([torch.full((1,), -1.0, dtype=torch.float64), *(own.flatten() for own in levels)])
    thresholds = torch.unique_consecutive(every.sort().values)
    first = lowest(None)
    # What is not stored freezes in large blocks, and the next one may not fit; single columns still do.
    return at(lowest(first), first)


def _free_share(staircases: Sequence[Staircase]) -> float:
    pairs = sum(staircase.rows * staircase.columns for staircase in staircases)
    return sum(staircase.num_free for staircase in staircases) / pairs
