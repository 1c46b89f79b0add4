"""A bank: what tasks changed in one checkpoint, a file for each, and bank.json, which is replaced last.

bank.json               {"format": "sculptor-bank", "version": 1, base, tasks, sha256}
NAME.safetensors        key.mean (g, d), key.scatter (g, d, d);  of each changed tensor T of the base  T.left (m, r) and
                        T.right (r, n), whose product is what the task added, or T.left alone, the whole difference
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from filelock import FileLock
from pydantic import Field
from torch import Tensor

from sculptor import __version__
from sculptor.checkpoint.reader import Checkpoint, identity
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tensors import read_header, read_known, write_tensors
from sculptor.checkpoint.written import LOCK_NAME
from sculptor.edits.compact import Compact
from sculptor.errors import BankError
from sculptor.numerics.routing import Key
from sculptor.progress import Progress, silent
from sculptor.validation import (
    STRICT,
    Count,
    FileName,
    Name,
    Sha256,
    Share,
    check_file,
    file_digest,
    parse,
    read_file,
    read_json,
    sign,
)

BANK_NAME = "bank.json"
FORMAT, VERSION = "sculptor-bank", 1
_REMEDY = "make it anew with `sculptor bank add`"
BEGAN = "use the one that its tasks began from"
_LEFT, _RIGHT = ".left", ".right"
_KEY = {"key.mean", "key.scatter"}
TaskName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w-]+$")]


@dataclass(frozen=True, slots=True)
class BankTask:
    """One task of a bank.

    Attributes:
        name: of the task.
        file: in the bank, of `num_bytes` bytes with the digest `sha256`.
        rows: that its key is of.
        num_tensors: how many tensors of the base it changes.
        kept: share of ||dW|| that is kept.
    """

    __pydantic_config__ = STRICT

    name: TaskName
    file: FileName
    num_bytes: Count
    sha256: Sha256
    rows: Count
    num_tensors: Count
    kept: Share


@dataclass(frozen=True, slots=True)
class _Manifest:
    __pydantic_config__ = STRICT

    created_by: Name
    base: Sha256
    tasks: tuple[BankTask, ...]


class Deltas(Mapping[str, Compact]):
    """What a task changed, by tensor of the base, read when it is asked for; and its key."""

    def __init__(self, path: Path, rows: int) -> None:
        self._path, self._rows = path, rows
        self._infos, _ = read_header(path, BankError)

    def _read(self, name: str) -> Tensor:
        return read_known(self._path, name, self._infos[name], BankError)

    @cached_property
    def key(self) -> Key:
        """What rows are compared with."""
        return Key(self._rows, self._read("key.mean"), self._read("key.scatter"))

    def __getitem__(self, name: str) -> Compact:
        right = self._read(name + _RIGHT) if name + _RIGHT in self._infos else None
        return Compact(self._read(name + _LEFT), right)

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the tensors that it changes."""
        return frozenset(name.removesuffix(_LEFT) for name in self._infos if name.endswith(_LEFT))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


class Bank:
    """A bank that is read.

    Raises:
        BankError: if it is missing, damaged, or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / BANK_NAME
        if not file.is_file():
            raise BankError(f"{self.path}: no {BANK_NAME}; expected a bank, made by `sculptor bank add`")
        content = parse(read_file(file, BankError, _REMEDY), file, BankError, _REMEDY)
        if (content.pop("format", None), content.pop("version", None)) != (FORMAT, VERSION):
            raise BankError(f"{file}: not a bank of version {VERSION}; {_REMEDY}")
        if content.pop("sha256", None) != sign(content):
            raise BankError(f"{file}: has changed since it was written (its digest differs); {_REMEDY}")
        manifest = read_json(_Manifest, json.dumps(content), file, BankError, _REMEDY)
        self.base, self.tasks = manifest.base, manifest.tasks
        self._deltas: dict[str, Deltas] = {}

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [task.name for task in self.tasks]

    @property
    def num_bytes(self) -> int:
        """Of all tasks."""
        return sum(task.num_bytes for task in self.tasks)

    def deltas(self, name: str) -> Deltas:
        """What one task changed.

        Raises:
            BankError: if there is none of that name, or its file is not as it was written.
        """
        found = next((task for task in self.tasks if task.name == name), None)
        if found is None:
            raise BankError(f"{self.path}: no task {name!r}; there are {', '.join(self.names)}")
        if name not in self._deltas:
            file = self.path / found.file
            check_file(file, found.sha256, BankError, _REMEDY)
            self._deltas[name] = Deltas(file, found.rows)
        return self._deltas[name]

    def keys(self) -> list[Key]:
        """Of all tasks."""
        return [self.deltas(name).key for name in self.names]

    def check_base(self, checkpoint: Checkpoint, progress: Progress = silent) -> None:
        """Checks that the bank is of a checkpoint, byte for byte.

        Raises:
            BankError: if it is of another one.
        """
        if base_identity(checkpoint, progress) != self.base:
            raise BankError(f"{self.path}: bank of another checkpoint than {checkpoint.path}; {BEGAN}")


def base_identity(checkpoint: Checkpoint, progress: Progress) -> str:
    """One digest of all tensors."""
    return identity(checkpoint.digests_beside((), progress))


def bank_to_add_to(directory: Path, name: str) -> Bank | None:
    """The bank that gets a task; None if it is still to be made, in no or an empty directory, or where that was broken off.

    Raises:
        BankError: if it has the task, is no bank, or holds somebody's file where that of the task goes.
    """
    _check_file(_file_of(directory, name))
    begun = (directory / LOCK_NAME).is_file() and not (directory / BANK_NAME).exists()
    if begun or not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    found = Bank(directory)
    if name in found.names:
        raise BankError(f"{directory}: has a task {name} already; choose another --name")
    return found


def _file_of(directory: Path, name: str) -> Path:
    return directory / f"{name}.safetensors"


def _check_file(file: Path) -> None:
    """Refuses one that `bank add` did not write; what a run wrote that broke off before the bank listed it is replaced."""
    if not os.path.lexists(file):
        return
    with suppress(BankError):
        names = set(read_header(file, BankError)[0])
        if names >= _KEY and all(name.endswith((_LEFT, _RIGHT)) for name in names - _KEY):
            return
    raise BankError(f"{file}: is there already, and no task that was added; move it or choose another --name")


def write_task(
    directory: Path, base: str, name: str, key: Key, deltas: Mapping[str, Compact], kept: float
) -> tuple[BankTask, ...]:
    """Writes a task's file, and then the bank's: until then it is as it was, or not there.

    Args:
        directory: of the bank, which another run may be adding to.
        base: digest of its checkpoint.
        name: of the task.
        key: of its rows.
        deltas: what it changed.
        kept: share of ||dW|| that is kept.

    Returns:
        All tasks of the bank; this one is the last.

    Raises:
        SculptorError: if it cannot be written, or another run has added that task, or one to another checkpoint.
    """
    with _locked(directory):
        found = bank_to_add_to(directory, name)
        if found is not None and found.base != base:
            raise BankError(f"{directory}: bank of another checkpoint now; {BEGAN}")
        others = () if found is None else found.tasks
        tasks = (*others, _write_file(directory, name, key, deltas, kept))
        content = json.loads(json.dumps(asdict(_Manifest(f"sculptor {__version__}", base, tasks))))
        write_json(directory / BANK_NAME, {"format": FORMAT, "version": VERSION} | content | {"sha256": sign(content)})
    return tasks


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """While nobody else adds to a bank; if it fails before there is one, nothing is left."""
    path = directory / LOCK_NAME
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path)
        with writing(path):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    finally:
        with suppress(OSError):
            if [item.name for item in directory.iterdir()] == [LOCK_NAME]:
                path.unlink()
                directory.rmdir()


def _write_file(directory: Path, name: str, key: Key, deltas: Mapping[str, Compact], kept: float) -> BankTask:
    tensors = {"key.mean": key.mean.to(torch.float32), "key.scatter": key.scatter.to(torch.float32)}
    for tensor, found in deltas.items():
        tensors[tensor + _LEFT] = found.left
        if found.right is not None:
            tensors[tensor + _RIGHT] = found.right
    file = _file_of(directory, name)
    staged = file.with_name(f"{file.name}.tmp")
    entries = [(each, value.dtype, tuple(value.shape)) for each, value in tensors.items()]
    try:
        write_tensors(staged, entries, tensors.__getitem__, {"format": "pt"})
        with writing(file):
            task = BankTask(name, file.name, staged.stat().st_size, file_digest(staged), key.rows, len(deltas), kept)
            staged.replace(file)
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return task
