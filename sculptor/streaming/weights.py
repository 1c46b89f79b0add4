"""The parameters of a model's blocks, as the device wants them, while they are not there.

`cpu`: one region of host memory per block. `disk`: straight from the checkpoint's own files, block by block, and from
a scratch file once a block has been changed. `device`: on the device after all, but only what this process owns of each block,
as in host memory too where several processes divide the model.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sculptor.checkpoint.names import Conversion
from sculptor.checkpoint.reader import Checkpoint, Placed, Slice
from sculptor.checkpoint.staging import writing
from sculptor.checkpoint.tensors import read_bytes
from sculptor.checkpoint.windows import Window
from sculptor.errors import CheckpointError
from sculptor.streaming.layout import Layout
from sculptor.streaming.owners import Owners
from sculptor.streaming.regions import DeviceRegion, FileRegion, HostRegion, MemoryRegion, Region
from sculptor.streaming.transfers import DONE, Staging, Ticket

Tier = Literal["cpu", "disk", "device"]
STAGING_BYTES = {"cuda": 64 * 2**20, "cpu": 8 * 2**20}


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
            if not bool(into.isfinite().all()):
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

    def read(self, place: Placed, into: Tensor) -> None:
        """Fills a contiguous tensor with a tensor of the checkpoint, or a slice of one, in its own dtype or another."""
        info = self.checkpoint.info_of(place)
        try:
            if info.file not in self._open:
                self._open[info.file] = os.open(self.checkpoint.path / info.file, os.O_RDONLY)
            self._read(self._open[info.file], info.offset, info.dtype, into.view(-1))
        except OSError as cause:
            raise CheckpointError(
                f"{self.checkpoint.path / info.file}: cannot read tensor {place.name} ({cause})"
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


class BlockWeights:
    """The parameters of every block.

    Args:
        files: where they come from.
        layouts: of the parameters of each block, as the device holds them.
        scratch: makes room for them, and for what changes.
        tick: called with bytes read, while memory is filled.
        owners: of parameters, where several processes divide them; each holds and loads its own.
    """

    def __init__(
        self,
        files: TensorFiles,
        layouts: Sequence[Layout],
        scratch: "Scratch",
        tick: Callable[[int], object] = lambda _: None,
        owners: Owners | None = None,
    ) -> None:
        self.files = files
        self.layouts = layouts
        self.scratch = scratch
        self.owners = owners
        whole = [(0, layout.num_bytes) for layout in layouts]
        self._parts = whole if owners is None else [owners.my_part(i, layout) for i, layout in enumerate(layouts)]
        self._regions: dict[int, Region] = {}
        self._changed: set[tuple[int, str]] = set()
        if scratch.in_memory:
            for i, (start, stop) in enumerate(self._parts):
                region = self._regions[i] = scratch.region(f"weights-{i}", stop - start)
                assert isinstance(region, MemoryRegion)
                for name in self.names(i):
                    place = layouts[i][name]
                    view = region.memory[place.start - start : place.stop - start].view(place.dtype).view(place.shape)
                    files.fill(name, view)
                tick(stop - start)

    def names(self, block: int) -> list[str]:
        """The parameters of a block that are held here."""
        return [name for name in self.layouts[block] if self.owners is None or self.owners.mine(block, name)]

    def region(self, block: int) -> Region:
        """Where changed parameters of a block are kept."""
        if block not in self._regions:
            start, stop = self._parts[block]
            self._regions[block] = self.scratch.region(f"weights-{block}", stop - start)
        return self._regions[block]

    def written(self, block: int) -> Ticket:
        """What a load of a block has to wait for."""
        return self._regions[block].written if block in self._regions else DONE

    def load(self, block: int, memory: Tensor, names: Sequence[str] | None = None) -> None:
        """Fills device memory laid out like the block, all that is held here or some of it, on the current stream."""
        layout = self.layouts[block]
        start, stop = self._parts[block]
        if names is None and self.scratch.in_memory:
            self._regions[block].load(memory[start:stop], 0)
            return
        for name in self.names(block) if names is None else names:
            place = layout[name]
            if self.scratch.in_memory or (block, name) in self._changed:
                self._regions[block].load(memory[place.start : place.stop], place.start - start)
            else:
                self.files.fill(name, layout.view(memory, name))

    def store(self, block: int, memory: Tensor, name: str) -> None:
        """Keeps one parameter of a block that is in device memory, on the current stream."""
        place = self.layouts[block][name]
        self.region(block).store(memory[place.start : place.stop], place.start - self._parts[block][0])
        self._changed.add((block, name))

    def close(self) -> None:
        """Gives back files and memory."""
        self.files.close()
        for region in self._regions.values():
            region.close()
        self._regions.clear()
        self.scratch.close()


class Scratch:
    """Makes regions: files in a directory in the disk tier, else memory of the host or the device."""

    def __init__(self, tier: Tier, directory: Path | None, device: torch.device) -> None:
        self.tier = tier
        self.directory = directory
        self.device = device
        self.pinned = device.type == "cuda"
        size = STAGING_BYTES[device.type]
        self.reading = Staging(device, size)
        self.writing = Staging(device, size) if tier == "disk" else self.reading

    @property
    def in_memory(self) -> bool:
        """Whether everything waits in memory, none of it in files."""
        return self.tier != "disk"

    def close(self) -> None:
        """Gives back what files are read and written through."""
        for staging in {id(s): s for s in (self.reading, self.writing)}.values():
            staging.close()

    def region(self, name: str, num_bytes: int) -> Region:
        """Room for some bytes."""
        if self.tier == "cpu":
            return HostRegion(num_bytes, self.pinned)
        if self.tier == "device":
            return DeviceRegion(num_bytes, self.device)
        assert self.directory is not None
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        return FileRegion(self.directory / name, num_bytes, self.reading, self.writing)
