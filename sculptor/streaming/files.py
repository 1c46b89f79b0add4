"""A checkpoint's tensors, read straight into memory of the host or the device."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from sculptor.checkpoint.names import Conversion
from sculptor.checkpoint.reader import Checkpoint, Slice, Sliced
from sculptor.checkpoint.tensors import read_bytes
from sculptor.checkpoint.windows import Window
from sculptor.errors import CheckpointError
from sculptor.numerics.finite import is_finite
from sculptor.streaming.transfers import Staging


class TensorFiles:
    """A checkpoint's tensors read straight into memory that is there already, converted on the way.

    Args:
        checkpoint: where they are.
        sources: parameter -> tensor of the checkpoint, or how it is made of several.
    """

    def __init__(self, checkpoint: Checkpoint, sources: Mapping[str, str | Conversion], staging: Staging) -> None:
        self.checkpoint = checkpoint
        self.sources = dict(sources)
        self._staging = staging
        self._open: dict[str, int] = {}
        self._seen: set[str] = set()
        self._windows: dict[str, dict[str, Window] | None] = {}

    def fill(self, parameter: str, into: Tensor) -> None:
        """Fills a contiguous tensor of the device or of the host with one parameter.

        Raises:
            CheckpointError: if it cannot be read, or, looked at once, has NaN or infinite values.
        """
        source = self.sources[parameter]
        if isinstance(source, Conversion):
            self._convert(source, parameter, into)
        else:
            self.read(Slice(source), into)
        if parameter not in self._seen:
            self._seen.add(parameter)
            if not is_finite(into):
                raise CheckpointError(
                    f"{self.checkpoint.path}: {parameter} has NaN or infinite values; use a checkpoint from before the "
                    "training diverged"
                )

    def _convert(self, source: Conversion, parameter: str, into: Tensor) -> None:
        """Matrix by matrix, where each has a place of its own."""
        if parameter not in self._windows:
            self._windows[parameter] = source.windows(
                {name: info.shape for name, info in self.checkpoint.infos.items()}
            )
        windows = self._windows[parameter]
        if windows is None:
            into.copy_(source.make(self.checkpoint.__getitem__)[parameter])
            return
        for name, window in windows.items():
            self.read(Slice(name), window.of(into))

    def read(self, at: Sliced, into: Tensor) -> None:
        """Fills a contiguous tensor with a tensor of the checkpoint, or a slice of one, in its own dtype or another."""
        info = self.checkpoint.info_of(at)
        try:
            if info.file not in self._open:
                self._open[info.file] = os.open(self.checkpoint.path / info.file, os.O_RDONLY)
            self._read(self._open[info.file], info.offset, info.dtype, into.view(-1))
        except OSError as cause:
            raise CheckpointError(
                f"{self.checkpoint.path / info.file}: cannot read tensor {at.name} ({cause})"
            ) from cause

    def _read(self, descriptor: int, offset: int, dtype: torch.dtype, into: Tensor) -> None:
        if into.device.type == "cpu" and into.dtype == dtype:
            read_bytes(descriptor, offset, into.view(torch.uint8))
            return
        step = self._staging.num_bytes // dtype.itemsize
        for at in range(0, into.numel(), step):
            part = into[at : at + step]
            staged = self._staging.take()[: part.numel() * dtype.itemsize]
            read_bytes(descriptor, offset + at * dtype.itemsize, staged)
            typed = staged.view(dtype)
            if part.dtype != dtype:
                typed = typed.to(part.device, non_blocking=True)  # converted where it goes
            part.copy_(typed, non_blocking=True)
            self._staging.used()

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
