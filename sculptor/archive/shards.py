"""Shards of an archive: rules are gathered, and written by a thread while the next shard fills up."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sculptor.archive.manifest import MatrixRecord, StoredTensor
from sculptor.archive.store import Archive
from sculptor.checkpoint.staging import writing
from sculptor.checkpoint.tensors import digest, dtype_name, write_tensors
from sculptor.methods.method import Derived
from sculptor.numerics.transfer import moved

# Two buffers of this size are the price: one shard fills up while the one before is hashed and written by a thread.
# Small, because analysis promises little memory.
MAX_SHARD_BYTES = 256 * 2**20
_HASHING = 2  # threads: writing takes about as long as two of them


@dataclass(frozen=True, slots=True)
class Shard:
    """A complete file of tensors, under a name of its own until it has a number, and the matrices whose rules these are."""

    file: str | None  # None where the rules have no tensors that are not stored already
    tensors: Mapping[str, StoredTensor]
    records: Mapping[str, MatrixRecord]


class ShardWriter:
    """Gathers rules, and writes a shard of them in a thread while the next fills up; every process may have one.

    Args:
        directory: an existing directory, staged by the caller.
        dtype: of tensors with orthonormal columns.
        max_shard_bytes: size at which a shard is written.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.directory = directory
        self.dtype = dtype
        self.max_shard_bytes = max_shard_bytes
        self.shared: set[str] = set()
        """Stored tensors that further matrices may share."""
        self._tensors: dict[str, Tensor] = {}
        self._records: dict[str, MatrixRecord] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[Shard] | None = None
        self._handed: list[Future[Shard]] = []

    def add(self, record: MatrixRecord, derived: Derived) -> None:
        """Takes one matrix with its rule and tensors."""
        names: dict[str, str] = {}
        for name, tensor in derived.tensors.items():
            shared = name in derived.shared
            stored = f"{record.input_group if shared else record.name}.{name}"
            names[name] = stored
            if shared and stored in self.shared:
                continue
            self.shared |= {stored} if shared else set()
            self._tensors[stored] = self._as_stored(derived, name, tensor)
        self._take(replace(record, rule=derived.rule, tensors=names))

    def keep(self, record: MatrixRecord, archive: Archive) -> None:
        """Takes a matrix of another archive with its rule and tensors, bit for bit."""
        for stored in record.tensors.values():
            if stored not in self.shared:
                self.shared.add(stored)
                self._tensors[stored] = archive.tensor(stored)
        self._take(record)

    def flush(self) -> None:
        """Hands what was taken to the thread, once that is done with the shard before it."""
        if not self._records:
            return
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._store, self._tensors, self._records)
        self._handed.append(self._last)
        self._tensors, self._records = {}, {}

    def hand_over(self) -> list[Future[Shard]]:
        """Shards that were given to the thread since this was asked last, in their order."""
        handed, self._handed = self._handed, []
        return handed

    def close(self) -> None:
        """Lets the thread end; after an error nothing is written any more once this returns."""
        self._thread.shutdown(wait=True)

    def _take(self, record: MatrixRecord) -> None:
        self._records[record.name] = record
        if sum(tensor.nbytes for tensor in self._tensors.values()) >= self.max_shard_bytes:
            self.flush()

    def _as_stored(self, derived: Derived, name: str, tensor: Tensor) -> Tensor:
        """Bases in the archive's dtype or wider, other tensors in their own."""
        if name in derived.rule.orthonormal:
            dtype = torch.promote_types(self.dtype, torch.float32) if name in derived.exact else self.dtype
            return moved(tensor, "cpu", dtype).contiguous()
        return tensor.to("cpu").contiguous()

    def _store(self, tensors: Mapping[str, Tensor], records: Mapping[str, MatrixRecord]) -> Shard:
        if not tensors:
            return Shard(None, {}, records)
        # No two shards begin with one matrix, whichever process they are of.
        name = f"shard-{hashlib.sha256(next(iter(records)).encode()).hexdigest()[:16]}.safetensors"
        with ThreadPoolExecutor(max_workers=_HASHING) as pool:
            digests = pool.map(digest, tensors.values())  # while they are written
            save_tensors(tensors, self.directory / name)
        found = {
            key: StoredTensor(name, dtype_name(tensor.dtype), tuple(tensor.shape), made)
            for (key, tensor), made in zip(tensors.items(), digests, strict=True)
        }
        return Shard(name, found, records)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors to a file that is either complete or not there.

    Raises:
        OutputError: if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensors(temporary, entries, tensors.__getitem__, {"format": "pt"})
    with writing(path):
        temporary.replace(path)
