"""Many staircase rules of one shape as one: small matrices cost more to start than to turn."""

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from sculptor.methods.rule import Tensors
from sculptor.numerics.free_space import FreeSpace, box_origin, first_free, hull
from sculptor.numerics.staircase import Staircase


def kinds_of(tensors: Tensors) -> Hashable:
    """Sides as far as they have to be alike: how many directions are written out differs with the steps."""
    known = (
        (name, tensor.shape[:1] if name.endswith("columns") else tuple(tensor.shape))
        for name, tensor in tensors.items()
        if not name.startswith("soft")
    )
    return tuple(known), "soft_inputs" in tensors


class Whole(Protocol):
    """The rule of a staircase."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of its coordinates."""

    def space(self, tensors: Tensors) -> FreeSpace:
        """What is free, with sides as prepared; those of several matrices as one."""


class StaircaseStack:
    """Staircases of one shape as one: all coordinates go into boxes of one size, and the boxes are turned together.

    The box holds every direction in which one of the matrices has a free pair; where a matrix is frozen it stays 0.

    Args:
        staircases: one per matrix.
        whole: a rule whose staircase is their hull.
    """

    def __init__(self, staircases: Sequence[Staircase], whole: Whole) -> None:
        self.staircases = tuple(staircases)
        self.whole = whole
        whole_box = hull(staircases)
        self.first, self.least = first_free(whole_box)
        self.origin = box_origin(whole_box)
        self.alike = len(set(staircases)) == 1 and len(whole.shapes) == len(staircases[0].free)

    def prepare(self, tensors: Sequence[Tensors]) -> Tensors:
        """Stacked, with the reach of every row; softening begins at the box's first directions."""
        rows, columns = self.whole.shape
        free = rows - self.origin[0], columns - self.origin[1]
        names = (("soft_outputs", "output_columns"), ("soft_inputs", "input_columns"))
        lengths = {name: length for pair, length in zip(names, free, strict=True) for name in pair}

        def longer(name: str, tensor: Tensor) -> Tensor:
            return pad(tensor, (lengths[name] - tensor.shape[-1], 0)) if name in lengths else tensor

        found = {name: torch.stack([longer(name, each[name]) for each in tensors]) for name in tensors[0]}
        if self.alike:
            return found
        device = next(iter(found.values())).device
        return found | {"reach": torch.stack([self._reach(staircase) for staircase in self.staircases]).to(device)}

    def _reach(self, staircase: Staircase) -> Tensor:
        """(p,): how many columns of the box are frozen, row by row."""
        sizes = torch.tensor([stop - max(start, self.first) for start, stop, _ in staircase.groups])
        reaches = torch.tensor([reach - self.least for _, _, reach in staircase.groups])
        return reaches.repeat_interleave(sizes.clamp_min(0))

    def update(self, tensors: Tensors, coordinates: Sequence[Sequence[Tensor]]) -> Tensor:
        """dW (s, m, n)."""
        flat = [a.reshape(-1) for (a,) in coordinates]
        rows, columns = self.whole.shape
        shape = len(coordinates), rows - self.first, columns - self.least
        if self.alike:
            boxes = torch.cat(flat).view(shape)
        else:
            boxes = flat[0].new_zeros(shape).masked_scatter_(self._free(tensors), torch.cat(flat))
        return self.whole.space(tensors).fold([boxes])

    def project(
        self, tensors: Tensors, coordinates: Sequence[Sequence[Tensor]], gradients: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """The gradient of every A."""
        (boxes,) = self.whole.space(tensors).project(gradients)
        sizes = [a.numel() for (a,) in coordinates]
        flat = boxes.reshape(-1)  # row by row, as the A_g lie
        if not self.alike:  # how many are free is known, so that nobody has to wait for the device to count them
            flat = flat[torch.nonzero_static(self._free(tensors).view(-1), size=sum(sizes)).view(-1)]
        parts = torch.split(flat, sizes)
        return [(part.view(a.shape),) for part, (a,) in zip(parts, coordinates, strict=True)]

    def _free(self, tensors: Tensors) -> Tensor:
        """(s, p, q): the free pairs of the boxes."""
        reach = tensors["reach"]
        return torch.arange(self.whole.shape[1] - self.least, device=reach.device) >= reach[..., None]
