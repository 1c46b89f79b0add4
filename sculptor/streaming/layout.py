"""Tensors side by side in one piece of memory, so that they move as one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes


@dataclass(frozen=True, slots=True)
class Span:
    """One tensor in a layout; `start` and `stop` in bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past its last byte."""
        return self.start + torch.Size(self.shape).numel() * self.dtype.itemsize


class Layout(Mapping[str, Span]):
    """Name -> span, in order.

    Args:
        entries: name, dtype and shape of each tensor.
    """

    def __init__(self, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self._spans: dict[str, Span] = {}
        self.num_bytes = 0
        for name, dtype, shape in entries:
            span = Span(self.num_bytes, dtype, tuple(shape))
            self._spans[name] = span
            self.num_bytes = -(-span.stop // ALIGNMENT) * ALIGNMENT

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """For tensors like these."""
        return cls((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())

    def __getitem__(self, name: str) -> Span:
        return self._spans[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def view(self, memory: Tensor, name: str) -> Tensor:
        """One tensor of a piece of memory (bytes,) that is laid out like this."""
        span = self[name]
        return memory[span.start : span.stop].view(span.dtype).view(span.shape)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.view(memory, name) for name in self}
