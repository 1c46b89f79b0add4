"""Where tensors wait while they are not in a slot: host memory, a file, or other memory of the device.

Parameters of blocks, in the tier `cpu`: one region of host memory per block. `disk`: straight from the checkpoint's own files,
block by block, and from a scratch file once a block has been changed. `device`: on the device after all, but only what this
process owns of each block, as in host memory too where several processes divide the model.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sculptor.checkpoint.staging import writing
from sculptor.checkpoint.tensors import read_bytes, write_bytes
from sculptor.streaming.files import TensorFiles
from sculptor.streaming.layout import Layout
from sculptor.streaming.owners import Owners
from sculptor.streaming.transfers import DONE, Staging, Ticket, free_host_memory, host_memory

Tier = Literal["cpu", "disk", "device"]
STAGING_BYTES = {"cuda": 64 * 2**20, "cpu": 8 * 2**20}


class Region(ABC):
    """Bytes that are read into device memory and written back, any range of them.

    Attributes:
        num_bytes: how many.
        written: the last store that it was given; what loads it has to wait for that.
    """

    written: Ticket = DONE

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    @abstractmethod
    def load(self, into: Tensor, start: int) -> None:
        """Fills device bytes from here, on the current stream; what follows on that stream sees them."""

    @abstractmethod
    def store(self, source: Tensor, start: int) -> None:
        """Takes device bytes, which may be changed when the current stream is past this."""

    def close(self) -> None:  # noqa: B027 - nothing to do for most
        """Gives back what it holds."""


class MemoryRegion(Region):
    """In memory, as bytes; new ones are 0."""

    memory: Tensor

    def load(self, into: Tensor, start: int) -> None:
        into.copy_(self.memory[start : start + into.numel()], non_blocking=True)

    def store(self, source: Tensor, start: int) -> None:
        self.memory[start : start + source.numel()].copy_(source, non_blocking=True)

    def close(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


class DeviceRegion(MemoryRegion):
    """In memory of the device itself."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        super().__init__(num_bytes)
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def load(self, into: Tensor, start: int) -> None:
        source = self.memory[start : start + into.numel()]
        into.copy_(source, non_blocking=into.device == source.device)  # the host would not know when it is there


class HostRegion(MemoryRegion):
    """In host memory, pinned if the device is a GPU."""

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        super().__init__(num_bytes)
        self.memory = host_memory(num_bytes, pinned)

    def close(self) -> None:
        free_host_memory(self.memory)
        super().close()


class FileRegion(Region):
    """In a file, through two pieces of host memory for reading and two for writing.

    Raises:
        OutputError: if the file cannot be made or written.
    """

    def __init__(self, path: Path, num_bytes: int, reading: Staging, writing_: Staging) -> None:
        super().__init__(num_bytes)
        self.path = path
        self._reading = reading
        self._writing = writing_
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.truncate(path, num_bytes)
            except OSError:
                os.close(self._file)
                raise

    def load(self, into: Tensor, start: int) -> None:
        if into.device.type == "cpu":
            read_bytes(self._file, start, into)
            return
        for at in range(0, into.numel(), self._reading.num_bytes):
            part = into[at : at + self._reading.num_bytes]
            staged = self._reading.take()[: part.numel()]
            read_bytes(self._file, start + at, staged)
            part.copy_(staged, non_blocking=True)
            self._reading.used()

    def store(self, source: Tensor, start: int) -> None:
        with writing(self.path):
            if source.device.type == "cpu":
                write_bytes(self._file, start, source)
                return
            waiting: tuple[Tensor, int] | None = None
            for at in range(0, source.numel(), self._writing.num_bytes):
                part = source[at : at + self._writing.num_bytes]
                staged = self._writing.take()[: part.numel()]
                staged.copy_(part, non_blocking=True)
                self._writing.used()
                if waiting is not None:  # the one before is written while this one is copied
                    write_bytes(self._file, waiting[1], waiting[0])
                torch.cuda.current_stream().synchronize()
                waiting = staged, start + at
            if waiting is not None:
                write_bytes(self._file, waiting[1], waiting[0])

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(OSError):  # scratch: what stays goes with its directory
                self.path.unlink()


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


class BlockWeights:
    """The parameters of every block.

    Args:
        files: where they come from.
        layouts: of the parameters of each block, as the device holds them.
        scratch: makes room for them, and for what changes.
        constants: makes room for what does not change in training, bases and W0; default `scratch`.
        tick: called with bytes read, while memory is filled.
        owners: of parameters, where several processes divide them; each holds and loads its own.
    """

    def __init__(
        self,
        files: TensorFiles,
        layouts: Sequence[Layout],
        scratch: Scratch,
        tick: Callable[[int], object] = lambda _: None,
        owners: Owners | None = None,
        constants: Scratch | None = None,
    ) -> None:
        self.files = files
        self.layouts = layouts
        self.scratch = scratch
        self.constants = constants or scratch
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
                    span = layouts[i][name]
                    view = region.memory[span.start - start : span.stop - start].view(span.dtype).view(span.shape)
                    files.fill(name, view)
                tick(stop - start)

    def names(self, block: int) -> list[str]:
        """The parameters of a block that are held here."""
        return [name for name in self.layouts[block] if self.owners is None or self.owners.mine(block, name)]

    def region(self, block: int) -> Region:
        """Where changed parameters of a block are kept; made when it is first asked for, by the thread that trains."""
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
            span = layout[name]
            if self.scratch.in_memory or (block, name) in self._changed:
                self._regions[block].load(memory[span.start : span.stop], span.start - start)
            else:
                self.files.fill(name, layout.view(memory, name))

    def store(self, block: int, memory: Tensor, name: str) -> None:
        """Keeps one parameter of a block that is in device memory, on the current stream; its region has been asked for."""
        span = self.layouts[block][name]
        self._regions[block].store(memory[span.start : span.stop], span.start - self._parts[block][0])
        self._changed.add((block, name))

    def close(self) -> None:
        """Gives back files and memory."""
        self.files.close()
        for region in self._regions.values():
            region.close()
        self._regions.clear()
        for scratch in (self.scratch, self.constants):
            scratch.close()
