"""Tensors side by side in one piece of memory, so that they move as one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor in a layout; `start` and `stop` in bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past its last byte."""
        return self.start + torch.Size(self.shape).numel() * self.dtype.itemsize


class Layout(Mapping[str, Place]):
    """Name -> place, in order.

    Args:
        entries: name, dtype and shape of each tensor.
    """

    def __init__(self, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self._places: dict[str, Place] = {}
        self.num_bytes = 0
        for name, dtype, shape in entries:
            place = Place(self.num_bytes, dtype, tuple(shape))
            self._places[name] = place
            self.num_bytes = -(-place.stop // ALIGNMENT) * ALIGNMENT

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """For tensors like these."""
        return cls((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())

    def __getitem__(self, name: str) -> Place:
        return self._places[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def view(self, memory: Tensor, name: str) -> Tensor:
        """One tensor of a piece of memory (bytes,) that is laid out like this."""
        place = self[name]
        return memory[place.start : place.stop].view(place.dtype).view(place.shape)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.view(memory, name) for name in self}
