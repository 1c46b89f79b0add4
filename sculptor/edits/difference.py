"""What becomes of the difference between two checkpoints:  W = W0 + factor * kept(W1 - W0),  in float64, rounded once.

Where nothing stays of a difference, W has the bits of W0; where all of it does, those of W1.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sculptor.checkpoint.places import Place
from sculptor.errors import EditError
from sculptor.numerics.finite import is_finite

_PIECE = 2**24  # entries that are computed with at once, where each is for itself


class Where(NamedTuple):
    """A tensor of the checkpoint that is edited, or a slice of one."""

    name: str
    part: int | None
    place: Place


class Edit(Protocol):
    """What is done to the difference of two checkpoints.

    Attributes:
        by_entry: whether every entry is for itself, so that `kept` is all of a difference.
    """

    by_entry: ClassVar[bool]

    def is_sliced(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is a stack of matrices that are edited one by one."""

    def factor(self, where: Where) -> float:
        """How much stays of what is kept."""

    def kept(self, where: Where, base: Tensor, difference: Tensor) -> Tensor:
        """What is kept of a difference to the base, both as stored, the difference float64."""


class Norms(NamedTuple):
    """Squared norms: of W0, of the whole difference, and of what stays of it in the dtype written."""

    base: float
    difference: float
    stays: float


class Edited(NamedTuple):
    """A tensor after an edit, and its norms."""

    tensor: Tensor
    norms: Norms


def edit_tensor(
    where: Where, base: Tensor, tuned: Tensor, factor: float, dtype: torch.dtype, kept: Tensor | None = None
) -> Edited:
    """One tensor.

    Args:
        where: it is.
        base: W0, of any floating dtype.
        tuned: W1, of the same shape.
        factor: how much stays of what is kept.
        dtype: of the result.
        kept: of W1 - W0; None for all of it.

    Raises:
        EditError: if the result does not fit the dtype.
    """
    tensor = torch.empty(base.shape, dtype=dtype)
    pieces = (_pieces(each) for each in (base, tuned, tensor))
    parts = None if kept is None else _pieces(kept)
    norms = torch.zeros(3, dtype=torch.float64)
    for i, (before, after, out) in enumerate(zip(*pieces, strict=True)):
        before64, after64 = before.to(torch.float64), after.to(torch.float64)
        new = blend(before64, after64, factor, None if parts is None else parts[i].to(torch.float64))
        out.copy_(new)
        norms += torch.stack(
            [each.square().sum().cpu() for each in (before64, after64 - before64, out.to(before64) - before64)]
        )
    if not is_finite(tensor):
        raise EditError(f"{where.name}: values overflow {dtype}; use --save-dtype float32 or a smaller --alpha")
    return Edited(tensor, Norms(*norms.tolist()))


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of rows that are computed with at once."""
    if not tensor.ndim:
        return (tensor,)
    rows = max(1, _PIECE * tensor.shape[0] // max(1, tensor.numel()))
    return torch.split(tensor, rows)


def blend(base: Tensor, tuned: Tensor, factor: float, kept: Tensor | None = None) -> Tensor:
    """W0 + factor * kept, float64 as all of its arguments; without `kept`, all of W1 - W0 is."""
    if factor == 0 or (factor == 1 and kept is None):
        return tuned if factor else base
    difference = tuned - base
    stays = factor * (difference if kept is None else kept)
    found = torch.where(stays == difference, tuned, base + stays)
    return torch.where(stays == 0, base, found)
