"""What a staircase leaves free of a matrix, as coordinates.

The allowed updates of W (m, n) are, over the row groups [a, b) of reach r,

    dW = sum_g  Q_U[:, a:b]  A_g  Q_V[:, r:]^T

with disjoint blocks, as many numbers as there are free pairs, and ||dW|| = ||A||. All groups lie in one box, the
directions from the first free row and the first free column on; it is filled with the A_g and zeros, and turned by the
two bases at once, whatever the number of groups. A side without stored directions uses the identity, so that
preserve 0 is A = dW.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.numerics.reflectors import CompleteBasis
from sculptor.numerics.staircase import RowGroup, Staircase


@dataclass(frozen=True, eq=False, slots=True)
class FreeSpace:
    """A staircase in its two bases; None stands for the identity.

    Attributes:
        staircase: which pairs are frozen.
        output, input: the completed bases.
        softening: how pairs of the box of free directions are slowed down: h (p,) and w (q,) for factors
            1 / sqrt(1 + h_i w_j) on coordinates and gradients, or None for 1 everywhere.

    Raises:
        ValueError: if the staircase tells directions apart that a side does not have.
    """

    staircase: Staircase
    output: CompleteBasis | None
    input: CompleteBasis | None
    softening: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.output is None and self.staircase.outputs) or (self.input is None and self.staircase.inputs):
            raise ValueError(f"steps {self.staircase.steps} tell directions apart, but none are stored")

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """The row groups with free pairs: the last ones."""
        return tuple(group for group in self.staircase.groups if group.reach < self.staircase.columns)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(p, q) of every A_g; none where all is frozen."""
        return tuple((group.stop - group.start, self.staircase.columns - group.reach) for group in self.groups)

    def fold(self, coordinates: Sequence[Tensor]) -> Tensor:
        """dW (m, n), computed in the dtype of the coordinates, which is that of the bases.

        Raises:
            ValueError: if nothing is free.
        """
        if not coordinates:
            raise ValueError("a matrix without free pairs has no update")
        update = self._box(coordinates)
        if self.softening is not None:
            update = update * self._gains()
        first, reach = self.groups[0].start, self.groups[-1].reach
        if self.input is not None:
            update = self.input.apply(update.T, reach).T
        if self.output is not None:
            update = self.output.apply(update, first)
        return update

    def project(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """The gradient of every A_g: Q_U[:, a:b]^T G Q_V[:, r:], for G (m, n) in the dtype of the bases."""
        first, least = self.groups[0].start, self.groups[-1].reach
        box = gradient
        if self.output is not None:
            box = self.output.apply_transposed(box, first)
        if self.input is not None:
            box = self.input.apply_transposed(box.T, least).T
        if self.softening is not None:
            box = box * self._gains()
        return tuple(
            box[group.start - first : group.stop - first, group.reach - least :].contiguous() for group in self.groups
        )

    def to64(self) -> "FreeSpace":
        """The same in float64, for the merge."""
        output, input = (side and side.to(dtype=torch.float64) for side in (self.output, self.input))
        softening = self.softening and (self.softening[0].to(torch.float64), self.softening[1].to(torch.float64))
        return FreeSpace(self.staircase, output, input, softening)

    def fingerprint(self) -> list[float]:
        """Identifies the bases up to rounding, since coordinates in one mean nothing in another."""
        sides = [(self.output, self.groups[0].start), (self.input, self.groups[-1].reach)]
        return [value for side, start in sides if side is not None for value in side.fingerprint(start)]

    def _gains(self) -> Tensor:
        assert self.softening is not None
        return torch.outer(*self.softening).add_(1).rsqrt_()

    def _box(self, coordinates: Sequence[Tensor]) -> Tensor:
        if len(coordinates) == 1:
            return coordinates[0]
        first, least = self.groups[0].start, self.groups[-1].reach
        shape = (self.staircase.rows - first, self.staircase.columns - least)
        box = torch.zeros(shape, dtype=coordinates[0].dtype, device=coordinates[0].device)
        for group, a in zip(self.groups, coordinates, strict=True):
            box[group.start - first : group.stop - first, group.reach - least :] = a
        return box
