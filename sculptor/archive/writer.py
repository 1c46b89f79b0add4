"""Writing archives: one matrix at a time, in shards that a killed run can be taken up behind."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from sculptor.archive.manifest import Manifest, MatrixRecord, Section, StoredTensor
from sculptor.archive.store import MANIFEST_NAME, Archive
from sculptor.checkpoint.reader import identity
from sculptor.checkpoint.staging import key_difference, write_json, writing
from sculptor.checkpoint.tensors import digest, dtype_name, read_tensor, write_tensors
from sculptor.checkpoint.written import empty
from sculptor.errors import OutputError
from sculptor.methods.kinds import KINDS, Kinds
from sculptor.methods.method import Derived
from sculptor.validation import STRICT, FileName, Name, file_digest, read_file, read_json

PROGRESS_NAME = "progress.json"
# Two buffers of this size are the price: one shard fills up while the one before is hashed and written by a thread.
# Small, because analysis promises little memory.
MAX_SHARD_BYTES = 256 * 2**20
_REMEDY = "pass --overwrite to start anew"


@dataclass(frozen=True, slots=True)
class _Progress:
    """progress.json: what complete shards hold, and what has to be the same for them to be of use."""

    __pydantic_config__ = STRICT

    key: Mapping[str, JsonValue]
    shards: tuple[FileName, ...]
    records: Mapping[Name, MatrixRecord]
    tensors: Mapping[Name, StoredTensor]


def has_progress(directory: Path) -> bool:
    """Whether a staging directory holds complete shards."""
    return (directory / PROGRESS_NAME).is_file()


class ArchiveWriter:
    """Fills a directory with an archive, one matrix at a time; `finish` writes the manifest.

    Shards are written as they fill up, and what they hold is noted in progress.json, so a killed run that is
    taken up again with the same `key` goes on behind the last complete shard.

    Args:
        directory: an existing directory, staged by the caller.
        dtype: of tensors with orthonormal columns.
        key: what has to be the same for earlier shards to be of use.
        kinds: of rules.
        max_shard_bytes: size at which a shard is written.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype,
        key: Mapping[str, Any],
        kinds: Kinds = KINDS,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.directory = directory
        self.dtype = dtype
        self.key = json.loads(json.dumps(key))
        self.kinds = kinds
        self.max_shard_bytes = max_shard_bytes
        self.records: dict[str, MatrixRecord] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_records: dict[str, MatrixRecord] = {}
        self._shards: list[str] = []
        self._shared: set[str] = set()  # stored tensors that further matrices may share
        self._sections: dict[str, Section] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._in_flight: tuple[Future[None], dict[str, Tensor], dict[str, MatrixRecord]] | None = None
        self._noted: dict[str, dict[str, Any]] = {}  # records and tensors as the note of complete shards has them
        self._noted_tensors: dict[str, dict[str, Any]] = {}

    def resume(self) -> None:
        """Takes up complete shards of a killed run; those that are not go.

        Raises:
            OutputError: if they were made with another key, or the note of them is damaged.
        """
        path = self.directory / PROGRESS_NAME
        if path.is_file():
            found = read_json(
                _Progress, read_file(path, OutputError, _REMEDY), path, OutputError, _REMEDY, kinds=self.kinds
            )
            different = key_difference(found.key, self.key)
            if different is not None:
                raise OutputError(
                    f"{path}: left by a run with other inputs or settings ({different}); use the same or {_REMEDY}"
                )
            self.records, self.tensors, self._shards = dict(found.records), dict(found.tensors), list(found.shards)
            self._shared = set(self.tensors)
            self._noted = {name: asdict(record) for name, record in self.records.items()}
            self._noted_tensors = {name: asdict(tensor) for name, tensor in self.tensors.items()}
        empty(self.directory, kept=(*self._shards, PROGRESS_NAME) if self._shards else ())

    def add(self, record: MatrixRecord, derived: Derived) -> None:
        """Takes one matrix with its rule and tensors; its decision may follow later."""
        names: dict[str, str] = {}
        for name, tensor in derived.tensors.items():
            shared = name in derived.shared
            stored = f"{record.input_group if shared else record.name}.{name}"
            names[name] = stored
            if shared and stored in self._shared:
                continue
            self._shared |= {stored} if shared else set()
            self._pending[stored] = self._as_stored(derived, name, tensor)
        self._take(replace(record, rule=derived.rule, tensors=names))

    def keep(self, record: MatrixRecord, archive: Archive) -> None:
        """Takes a matrix of another archive with its rule and tensors, bit for bit."""
        for stored in record.tensors.values():
            if stored not in self._shared:
                self._shared.add(stored)
                self._pending[stored] = archive.tensor(stored)
        self._take(record)

    def _take(self, record: MatrixRecord) -> None:
        self._pending_records[record.name] = record
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self.max_shard_bytes:
            self._write_shard()

    def _as_stored(self, derived: Derived, name: str, tensor: Tensor) -> Tensor:
        """Bases in the archive's dtype or wider, other tensors in their own."""
        if name in derived.rule.orthonormal:
            dtype = torch.promote_types(self.dtype, torch.float32) if name in derived.exact else self.dtype
            return tensor.to("cpu", dtype).contiguous()
        return tensor.to("cpu").contiguous()

    def add_section(self, name: str, content: bytes, suffix: str) -> None:
        """Takes an optional part of the archive.

        Raises:
            OutputError: if it cannot be written.
        """
        file = f"{name}{suffix}"
        with writing(self.directory / file):
            (self.directory / file).write_bytes(content)
        self._sections[name] = Section(file, len(content), hashlib.sha256(content).hexdigest())

    def add_tensors(
        self, name: str, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Tensor]
    ) -> None:
        """Takes an optional part that is a file of tensors, one of which is in memory at a time.

        Args:
            name: of the part.
            entries: dtype and shape of every tensor.
            read: gives one, on the CPU.

        Raises:
            OutputError: if it cannot be written.
        """
        file = self.directory / f"{name}.safetensors"
        write_tensors(file, [(key, *entry) for key, entry in entries.items()], read, {"format": "pt"})
        self._sections[name] = Section(file.name, file.stat().st_size, file_digest(file))

    def keep_sections(self, archive: Archive, without: Collection[str] = ()) -> None:
        """Takes the optional parts of another archive, byte for byte, `without` some.

        Raises:
            ArchiveError: if they have changed since they were written.
        """
        for name, part in archive.manifest.sections.items():
            if name in without:
                continue
            content = archive.section(name)
            assert content is not None
            self.add_section(name, content, Path(part.file).suffix)

    def update(self, record: MatrixRecord) -> None:
        """Replaces the facts of a matrix that was added; its tensors stay."""
        self._wait()
        known = self._pending_records if record.name in self._pending_records else self.records
        known[record.name] = record
        if record.name in self._noted:
            self._noted[record.name] = asdict(record)

    def all_records(self) -> list[MatrixRecord]:
        """Everything that was added."""
        self._wait()
        return [*self.records.values(), *self._pending_records.values()]

    def read(self, name: str) -> Tensor:
        """A tensor that was added, by its stored name."""
        self._wait()
        if name in self._pending:
            return self._pending[name]
        return read_tensor(self.directory / self.tensors[name].file, name, OutputError)

    def record(self, name: str) -> MatrixRecord:
        """A record that was added."""
        for known in (self._pending_records, self._in_flight[2] if self._in_flight else {}, self.records):
            if name in known:
                return known[name]
        raise KeyError(name)

    def flush(self) -> None:
        """Keeps what was added, for a run that is killed to be taken up behind it."""
        if self._pending_records:
            self._write_shard()

    def _write_shard(self) -> None:
        """Hands what is pending to the thread, after the shard before it."""
        self._wait()
        tensors, records = self._pending, self._pending_records
        self._in_flight = self._thread.submit(self._store, tensors, records), tensors, records
        self._pending, self._pending_records = {}, {}

    def _wait(self) -> None:
        """Until everything handed over is stored; raises what went wrong there."""
        if self._in_flight is not None:
            self._in_flight[0].result()
            self._in_flight = None

    def _store(self, tensors: Mapping[str, Tensor], records: Mapping[str, MatrixRecord]) -> None:
        """Writes a shard, and then the note that it is complete."""
        if tensors:
            name = f"subspaces-{len(self._shards) + 1:05d}.safetensors"
            save_tensors(tensors, self.directory / name)
            for key, tensor in tensors.items():
                dtype = dtype_name(tensor.dtype)
                self.tensors[key] = StoredTensor(name, dtype, tuple(tensor.shape), digest(tensor))
            self._shards.append(name)
        self.records |= records
        self._noted |= {
            record.name: asdict(record) for record in records.values()
        }  # once: the note is written many times
        self._noted_tensors |= {name: asdict(self.tensors[name]) for name in tensors}
        shards, found = tuple(self._shards), self._noted
        progress = {"key": self.key, "shards": shards, "records": found, "tensors": self._noted_tensors}
        write_json(self.directory / PROGRESS_NAME, progress, indent=None)

    def close(self) -> None:
        """Lets the thread end; after an error nothing is written any more once this returns."""
        self._thread.shutdown(wait=True)

    def finish(self, manifest: Manifest, *, keep_progress: bool = False) -> None:
        """Writes the last shard and archive.json.

        `manifest` lacks tensors, files, sections and identity; if it has matrices, they give the order. With `keep_progress`
        the archive can be taken up again until `forget_progress`.
        """
        self._write_shard()
        self._wait()
        ordered = [name for name in manifest.matrices if name in self.records] or list(self.records)
        self.records = {name: self.records[name] for name in ordered}
        manifest = replace(
            manifest,
            base_identity=identity({name: record.base_digest for name, record in self.records.items()}),
            matrices=self.records,
            tensors=self.tensors,
            files={name: (self.directory / name).stat().st_size for name in self._shards},
            sections=self._sections,
        )
        write_json(self.directory / MANIFEST_NAME, manifest.to_json())
        if not keep_progress:
            forget_progress(self.directory)


def forget_progress(directory: Path) -> None:
    """Removes the note of complete shards, once an archive is in its place."""
    with writing(directory):
        (directory / PROGRESS_NAME).unlink(missing_ok=True)


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
