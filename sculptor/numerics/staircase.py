"""Which pairs of (output direction, input direction) a matrix may not change.

With complete orthonormal bases Q_U (m, m) and Q_V (n, n), leading directions first, row i of the staircase
freezes the pairs (i, 0), ..., (i, reach_i - 1); reach never increases with i. The three constraints of the
literature are staircases (arXiv 2504.07097 prints `core`, its released code means `double`; `input` is GPM's):

    double: reach = n for i < k, else k       U_h^T dW = 0 and dW V_h = 0
    input:  reach = k for every i             dW V_h = 0
    core:   reach = k for i < k, else 0       U_h^T dW V_h = 0
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Constraint = Literal["double", "input", "core"]


class RowGroup(NamedTuple):
    """Output directions `start` to `stop` (exclusive), all with the same reach."""

    start: int
    stop: int
    reach: int


@dataclass(frozen=True, slots=True)
class Staircase:
    """The frozen pairs of one matrix (m, n).

    Attributes:
        rows: m, the number of output directions.
        columns: n, the number of input directions.
        steps: (stop row, reach) pairs, stop rows increasing up to m, reaches decreasing.
        groups: the rows, grouped by reach, in order; `free` those with free pairs, the last ones. Asked for in every step.
    """

    rows: int
    columns: int
    steps: tuple[tuple[int, int], ...]
    groups: tuple[RowGroup, ...] = field(init=False, repr=False, compare=False)
    free: tuple[RowGroup, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stops = [stop for stop, _ in self.steps]
        reaches = [reach for _, reach in self.steps]
        well_ordered = stops == sorted(set(stops)) and reaches == sorted(reaches, reverse=True)
        if not stops or stops[0] <= 0 or stops[-1] != self.rows or not well_ordered:
            raise ValueError(f"steps {self.steps} do not descend over {self.rows} rows")
        if not 0 <= reaches[-1] <= reaches[0] <= self.columns:
            raise ValueError(f"steps {self.steps} reach outside the {self.columns} columns")
        rows = zip((0, *stops), stops, reaches, strict=False)
        groups = tuple(RowGroup(start, stop, reach) for start, stop, reach in rows)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "free", tuple(group for group in groups if group.reach < self.columns))

    @classmethod
    def of(cls, constraint: Constraint, rows: int, columns: int, outputs: int, inputs: int) -> "Staircase":
        """The staircase that protects the first `outputs` output and `inputs` input directions."""
        steps: tuple[tuple[int, int], ...]
        match constraint:
            case "double":
                steps = ((outputs, columns), (rows, inputs))
            case "input":
                steps = ((rows, inputs),)
            case "core":
                steps = ((outputs, inputs), (rows, 0))
            case _:
                raise ValueError(f"unknown constraint {constraint!r}")
        return cls(rows, columns, merge_steps(steps))

    @classmethod
    def closed(cls, rows: int, columns: int) -> "Staircase":
        """Everything is frozen."""
        return cls(rows, columns, ((rows, columns),))

    @property
    def outputs(self) -> int:
        """How many leading output directions have to be told apart from the rest (ku)."""
        return self.steps[-2][0] if len(self.steps) > 1 else 0

    @property
    def inputs(self) -> int:
        """How many leading input directions have to be told apart from the rest (kv)."""
        return max((reach for _, reach in self.steps if reach < self.columns), default=0)

    @property
    def num_frozen(self) -> int:
        """Frozen (output, input) pairs."""
        return sum((stop - start) * reach for start, stop, reach in self.groups)

    @property
    def num_free(self) -> int:
        """Free pairs: the number of trainable coordinates."""
        return self.rows * self.columns - self.num_frozen

    @property
    def frozen_share(self) -> float:
        """Frozen pairs over all pairs."""
        return self.num_frozen / (self.rows * self.columns)


def merge_steps(steps: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Drops empty row groups and joins neighbours of equal reach."""
    merged: list[tuple[int, int]] = []
    for stop, reach in steps:
        if stop <= (merged[-1][0] if merged else 0):
            continue
        if merged and merged[-1][1] == reach:
            merged.pop()
        merged.append((stop, reach))
    return tuple(merged)
