"""Where tensors wait while they are not in a slot: host memory, a file, or other memory of the device."""

import contextlib
import os
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from sculptor.checkpoint.staging import writing
from sculptor.checkpoint.tensors import read_bytes, write_bytes
from sculptor.streaming.transfers import DONE, Staging, Ticket, free_host_memory, host_memory


class Region(ABC):
    """Bytes that are read into device memory and written back, any range of them.

    Attributes:
        written: the last store that it was given; what loads it has to wait for that.
    """

    written: Ticket = DONE

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
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def load(self, into: Tensor, start: int) -> None:
        source = self.memory[start : start + into.numel()]
        into.copy_(source, non_blocking=into.device == source.device)  # the host would not know when it is there


class HostRegion(MemoryRegion):
    """In host memory, pinned if the device is a GPU."""

    def __init__(self, num_bytes: int, pinned: bool) -> None:
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
