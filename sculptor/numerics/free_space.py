"""What a staircase leaves free of a matrix, as coordinates.

The allowed updates of W (m, n) are, over the row groups [a, b) of reach r,

    dW = sum_g  Q_U[:, a:b]  A_g  Q_V[:, r:]^T

with disjoint blocks, as many numbers as there are free pairs, and ||dW|| = ||A||. A is one matrix where there is one group,
and else all A_g in a row: one parameter of an optimizer, whatever the number of groups. All groups lie in one box, the
directions from the first free row and the first free column on; it is filled with the A_g and zeros, and turned by the
two bases at once. A side without stored directions uses the identity, so that
preserve 0 is A = dW. A large box begins some frozen rows or columns earlier, which stay 0: tensor cores multiply matrices whose
sides are no multiples of 8 up to six times slower.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sculptor.numerics.reflectors import FreeSide, box_start, named_tensors
from sculptor.numerics.staircase import RowGroup, Staircase, merge_steps

Name = Literal["output", "input"]
# When the sides of G = dY^T X are turned: after the sum over tokens, one of them before it, or both.
Order = Literal["after", "output", "input", "both"]
MANY_TOKENS = 2.0**40


def multiplications(
    tokens: float, shape: tuple[int, int], first: tuple[int, int], turns: tuple[int, int]
) -> dict[Order, float]:
    """What it takes to get the box of free directions of G = dY^T X, the sum over tokens with it, in every order.

    Args:
        tokens: t, the rows of X and dY.
        shape: (m, n).
        first: the first free direction of the outputs, and of the inputs.
        turns: multiplications to turn one vector of the outputs, and of the inputs.
    """
    m, n = shape
    p, q = m - first[0], n - first[1]
    outputs, inputs = turns
    return {
        "after": tokens * m * n + min(outputs * n + inputs * p, inputs * m + outputs * q),
        "input": tokens * (inputs + m * q) + outputs * q,
        "output": tokens * (outputs + p * n) + inputs * p,
        "both": tokens * (inputs + outputs + p * q),
    }


def narrow(side: FreeSide, first: int, name: Name, inputs: Tensor, outputs: Tensor) -> Tensor:
    """G = dY^T X with one side turned to its free directions before the sum: (m, n - first) or (m - first, n).

    Where few directions are free that is less to do than forming G, and less to keep.

    Args:
        side: of which the free directions are read.
        first: of them.
        name: which side it is.
        inputs: X (t, n).
        outputs: dY (t, m).
    """
    inputs, outputs = inputs.to(side.dtype), outputs.to(side.dtype)
    if name == "input":
        return outputs.mT @ side.apply_transposed(inputs.mT, first).mT
    return side.apply_transposed(outputs.mT, first) @ inputs


def coordinate_shapes(staircase: Staircase) -> tuple[tuple[int, ...], ...]:
    """Of A: (p, q) of the only row group with free pairs, or (pairs,) of several; none where all is frozen."""
    groups = staircase.free
    if len(groups) > 1:
        return ((staircase.num_free,),)
    return tuple((group.stop - group.start, staircase.columns - group.reach) for group in groups)


def first_free(staircase: Staircase) -> tuple[int, int]:
    """The first direction of the outputs, and of the inputs, that has a free pair."""
    groups = staircase.free
    return groups[0].start, groups[-1].reach


def box_origin(staircase: Staircase) -> tuple[int, int]:
    """The first row and column of the box: `first_free`, or a few directions before."""
    first, least = first_free(staircase)
    return box_start(first, staircase.rows), box_start(least, staircase.columns)


@dataclass(frozen=True, eq=False, slots=True)
class FreeSpace:
    """A staircase in its two bases; None stands for the identity.

    Attributes:
        staircase: which pairs are frozen.
        output, input: the directions of either side from the first that has a free pair on; all in one dtype, in
            which products are formed (bf16 will do for training: gradients are no finer, and the merge uses float64).
        softening: how pairs of the box of free directions are slowed down: h (p,) and w (q,) for factors
            1 / sqrt(1 + h_i w_j) on coordinates and gradients, or None for 1 everywhere.

    Raises:
        ValueError: if the staircase tells directions apart that a side does not have.
    """

    staircase: Staircase
    output: FreeSide | None
    input: FreeSide | None
    softening: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.output is None and self.staircase.outputs) or (self.input is None and self.staircase.inputs):
            raise ValueError(f"steps {self.staircase.steps} tell directions apart, but none are stored")

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """The row groups with free pairs: the last ones."""
        return self.staircase.free

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of A, as `coordinate_shapes`."""
        return coordinate_shapes(self.staircase)

    @property
    def first(self) -> int:
        """The first row of the box."""
        return box_origin(self.staircase)[0]

    @property
    def least(self) -> int:
        """The first column of the box."""
        return box_origin(self.staircase)[1]

    def fold(self, coordinates: Sequence[Tensor]) -> Tensor:
        """dW (m, n), in the dtype of the bases, or that of the coordinates where there are none.

        Raises:
            ValueError: if nothing is free.
        """
        if not coordinates:
            raise ValueError("a matrix without free pairs has no update")
        update = self._box(coordinates)
        update = update.to(self._dtype(update))
        turns = (self._turn_input, self._turn_output)
        for turn in turns if self._output_sees_all() else turns[::-1]:
            update = turn(update)
        return update

    def _turn_input(self, x: Tensor) -> Tensor:
        return x if self.input is None else self.input.apply(x.mT, self.least).mT

    def _turn_output(self, x: Tensor) -> Tensor:
        return x if self.output is None else self.output.apply(x, self.first)

    def project(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """The gradient of A for G (m, n), by groups Q_U[:, a:b]^T G Q_V[:, r:]; float32, or float64 with such bases."""
        box = gradient.to(self._dtype(gradient))
        reads = (self._read_output, self._read_input)
        for read in reads if self._output_sees_all() else reads[::-1]:
            box = read(box)
        return self._groups_of(box)

    def project_product(self, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, ...]:
        """`project` for G = dY^T X, both turned before it is formed.

        Args:
            inputs: X (t, n).
            outputs: dY (t, m).
        """
        dtype = self._dtype(inputs)
        left, right = self._read_output(outputs.mT.to(dtype)), self._read_input(inputs.to(dtype))
        return self._groups_of(left @ right)

    def project_narrowed(self, narrowed: Tensor, name: Name) -> tuple[Tensor, ...]:
        """`project` for what `narrow` has made of G."""
        narrowed = narrowed.to(self._dtype(narrowed))
        return self._groups_of(self._read_output(narrowed) if name == "input" else self._read_input(narrowed))

    def _groups_of(self, box: Tensor) -> tuple[Tensor, ...]:
        """The box's rows and columns that belong to coordinates, wide and slowed down."""
        box = box.to(torch.promote_types(box.dtype, torch.float32))
        if self.softening is not None:
            box = self._gains(box.dtype).mul_(box)
        if len(self.groups) == 1:
            return (next(self._parts(box)).contiguous(),)
        found = box.new_empty(*box.shape[:-2], self.staircase.num_free)
        for part, values in zip(self._parts(box), self._parts_of(found), strict=True):
            values.copy_(part)
        return (found,)

    def _read_input(self, x: Tensor) -> Tensor:
        return x if self.input is None else self.input.apply_transposed(x.mT, self.least).mT

    def _read_output(self, x: Tensor) -> Tensor:
        return x if self.output is None else self.output.apply_transposed(x, self.first)

    def _dtype(self, x: Tensor) -> torch.dtype:
        side = self.output or self.input
        return x.dtype if side is None else next(iter(side.tensors().values())).dtype

    def _output_sees_all(self) -> bool:
        """Whether it costs less to turn the outputs where there are n columns and the inputs where there are box rows.

        The other order turns the outputs of the box's columns only, but the inputs of all m rows.
        """
        outputs = self.output.cost(self.first) if self.output is not None else 0
        inputs = self.input.cost(self.least) if self.input is not None else 0
        return outputs * self.least <= inputs * self.first  # what either order turns in vain

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "FreeSpace":
        """The same elsewhere; gains stay float32 unless the bases become float64."""
        output, input = (side and side.to(device, dtype) for side in (self.output, self.input))
        wide = torch.float64 if dtype == torch.float64 else None
        softening = self.softening and (
            self.softening[0].to(device=device, dtype=wide or self.softening[0].dtype),
            self.softening[1].to(device=device, dtype=wide or self.softening[1].dtype),
        )
        return FreeSpace(self.staircase, output, input, softening)

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        found: dict[str, Tensor] = {}
        for side, part in (("output", self.output), ("input", self.input)):
            if part is not None:
                found |= named_tensors(side, part)
        if self.softening is not None:
            found |= {"soft_outputs": self.softening[0], "soft_inputs": self.softening[1]}
        return found

    def fingerprint(self) -> list[float]:
        """Identifies the bases up to rounding, since coordinates in one mean nothing in another."""
        sides = [(self.output, self.first), (self.input, self.least)]
        return [value for side, start in sides if side is not None for value in side.fingerprint(start)]

    def _gains(self, dtype: torch.dtype) -> Tensor:
        """Of the box; its own, to be written to: small matrices take longer to pass over than to turn."""
        assert self.softening is not None
        outputs, inputs = self.softening
        gains = (outputs[..., :, None] * inputs[..., None, :]).add_(1).rsqrt_()
        return gains.to(torch.promote_types(gains.dtype, dtype))

    def _box(self, coordinates: Sequence[Tensor]) -> Tensor:
        """The box of free directions, slowed down; 0 where a pair is frozen."""
        (a,) = coordinates
        shape = self.staircase.rows - self.first, self.staircase.columns - self.least
        if len(self.groups) == 1:
            if a.shape[-2:] == shape:
                return a if self.softening is None else self._gains(a.dtype).mul_(a)
            a = a.flatten(-2)
        if self.softening is None:
            box = a.new_zeros(*a.shape[:-1], *shape)
            for part, values in zip(self._parts(box), self._parts_of(a), strict=True):
                part.copy_(values)
            return box
        box = self._gains(a.dtype)
        for part, values in zip(self._parts(box), self._parts_of(a), strict=True):
            part.mul_(values)
        for frozen in self._frozen(box):
            frozen.zero_()
        return box

    def _parts_of(self, a: Tensor) -> Iterator[Tensor]:
        """Every A_g (..., rows, columns) of coordinates that lie in a row; views."""
        at = 0
        for group in self.groups:
            rows, columns = group.stop - group.start, self.staircase.columns - group.reach
            yield a[..., at : at + rows * columns].view(*a.shape[:-1], rows, columns)
            at += rows * columns

    def _frozen(self, box: Tensor) -> Iterator[Tensor]:
        """What of a box (..., m - first, n - least) belongs to no A_g; views."""
        yield box[..., : self.groups[0].start - self.first, :]
        for group in self.groups:
            yield box[..., group.start - self.first : group.stop - self.first, : group.reach - self.least]

    def _parts(self, box: Tensor) -> Iterator[Tensor]:
        """Where each A_g lies in a box (..., m - first, n - least); views."""
        for group in self.groups:
            yield box[..., group.start - self.first : group.stop - self.first, group.reach - self.least :]


def hull(staircases: Sequence[Staircase]) -> Staircase:
    """One box of directions that holds the free pairs of all, which have some; of one shape (m, n)."""
    firsts, leasts = zip(*map(first_free, staircases), strict=True)
    rows, columns = staircases[0].rows, staircases[0].columns
    return Staircase(rows, columns, merge_steps(((min(firsts), columns), (rows, min(leasts)))))
