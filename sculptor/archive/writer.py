"""Writing archives: one matrix at a time, in shards that a killed run can be taken up behind."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from sculptor.archive.manifest import Manifest, MatrixRecord, Section, StoredTensor
from sculptor.archive.shards import MAX_SHARD_BYTES, Shard, ShardWriter
from sculptor.archive.store import MANIFEST_NAME, Archive
from sculptor.checkpoint.reader import identity
from sculptor.checkpoint.run_keys import key_difference
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tensors import read_tensor, write_tensors
from sculptor.checkpoint.written import empty
from sculptor.errors import OutputError
from sculptor.methods.kinds import KINDS, Kinds
from sculptor.methods.method import Derived
from sculptor.validation import STRICT, FileName, Name, file_digest, read_file, read_json

PROGRESS_NAME = "progress.json"
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
    taken up again with the same `key` goes on behind the last complete shard. Other processes may write shards beside
    (`shards`), which the first one takes (`take`).

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
        self.key = json.loads(json.dumps(key))
        self.kinds = kinds
        self.records: dict[str, MatrixRecord] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.shards = ShardWriter(directory, dtype, max_shard_bytes)
        self._files: list[str] = []
        self._sections: dict[str, Section] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)  # notes what is complete
        self._noting: list[Future[None]] = []
        self._failed = False
        self._resumes = False
        self._noted: dict[str, dict[str, Any]] = {}  # records and tensors as the note of complete shards has them
        self._noted_tensors: dict[str, dict[str, Any]] = {}

    def resume(self) -> None:
        """Takes up complete shards of a killed run; those that are not go.

        Raises:
            OutputError: if they were made with another key, or the note of them is damaged.
        """
        self._resumes = True
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
            self.records, self.tensors, self._files = dict(found.records), dict(found.tensors), list(found.shards)
            self.shards.shared = set(self.tensors)
            self._noted = {name: asdict(record) for name, record in self.records.items()}
            self._noted_tensors = {name: asdict(tensor) for name, tensor in self.tensors.items()}
        empty(self.directory, kept=(*self._files, PROGRESS_NAME) if self._files else ())

    def add(self, record: MatrixRecord, derived: Derived) -> None:
        """Takes one matrix with its rule and tensors; its decision may follow later."""
        self.shards.add(record, derived)
        self._take_own()

    def keep(self, record: MatrixRecord, archive: Archive) -> None:
        """Takes a matrix of another archive with its rule and tensors, bit for bit."""
        self.shards.keep(record, archive)
        self._take_own()

    def take(self, shard: Shard | Future[Shard]) -> None:
        """Takes a shard that was written in this directory, by this process or another; it is noted once it is complete.

        Raises:
            OutputError: if one of those before could not be written.
        """
        for earlier in [each for each in self._noting if each.done()]:
            earlier.result()
            self._noting.remove(earlier)
        self._noting.append(self._thread.submit(self._note, shard))

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
        self.records[record.name] = record
        if record.name in self._noted:
            self._noted[record.name] = asdict(record)

    def all_records(self) -> list[MatrixRecord]:
        """Everything that was added, all of it in shards."""
        self._wait()
        return list(self.records.values())

    def read(self, name: str) -> Tensor:
        """A tensor that was added, by its stored name."""
        self._wait()
        return read_tensor(self.directory / self.tensors[name].file, name, OutputError)

    def record(self, name: str) -> MatrixRecord:
        """A record that was added."""
        self._wait()
        return self.records[name]

    def flush(self) -> None:
        """Keeps what was added, for a run that is killed to be taken up behind it."""
        self.shards.flush()
        self._take_own()

    def _take_own(self) -> None:
        for shard in self.shards.hand_over():
            self.take(shard)

    def _wait(self) -> None:
        """Until everything that was added is stored and noted; raises what went wrong there."""
        self.flush()
        for noting in self._noting:
            noting.result()
        self._noting = []

    def _note(self, shard: Shard | Future[Shard]) -> None:
        """Gives a complete shard its number, and writes the note of it; not behind one that is missing."""
        if self._failed:
            return
        try:
            self._number(shard.result() if isinstance(shard, Future) else shard)
        except BaseException:
            self._failed = True
            raise

    def _number(self, made: Shard) -> None:
        if made.file is not None:
            name = f"subspaces-{len(self._files) + 1:05d}.safetensors"
            with writing(self.directory / name):
                (self.directory / made.file).replace(self.directory / name)
            tensors = {key: replace(tensor, file=name) for key, tensor in made.tensors.items()}
            self._files.append(name)
            self.tensors |= tensors
            self._noted_tensors |= {key: asdict(tensor) for key, tensor in tensors.items()}
        self.records |= made.records
        # Once: the note is written many times.
        self._noted |= {record.name: asdict(record) for record in made.records.values()}
        shards, found = tuple(self._files), self._noted
        progress = {"key": self.key, "shards": shards, "records": found, "tensors": self._noted_tensors}
        write_json(self.directory / PROGRESS_NAME, progress, indent=None)

    def close(self) -> None:
        """Lets the threads end; after an error nothing is written any more once this returns, but what is complete is kept."""
        try:
            if self._resumes and not self._failed:
                with suppress(OutputError):  # of a shard before, which has been told
                    self._take_own()
        finally:
            self.shards.close()
            self._thread.shutdown(wait=True)

    def finish(self, manifest: Manifest, *, keep_progress: bool = False) -> None:
        """Writes the last shard and archive.json.

        `manifest` lacks tensors, files, sections and identity; if it has matrices, they give the order. With `keep_progress`
        the archive can be taken up again until `forget_progress`.
        """
        self._wait()
        self._thread.submit(self._complete, manifest).result()
        if not keep_progress:
            forget_progress(self.directory)

    def _complete(self, manifest: Manifest) -> None:
        ordered = [name for name in manifest.matrices if name in self.records] or list(self.records)
        self.records = {name: self.records[name] for name in ordered}
        manifest = replace(
            manifest,
            base_identity=identity({name: record.base_digest for name, record in self.records.items()}),
            matrices=self.records,
            tensors=self.tensors,
            files={name: (self.directory / name).stat().st_size for name in self._files},
            sections=self._sections,
        )
        write_json(self.directory / MANIFEST_NAME, manifest.to_json())


def forget_progress(directory: Path) -> None:
    """Removes the note of complete shards, once an archive is in its place."""
    with writing(directory):
        (directory / PROGRESS_NAME).unlink(missing_ok=True)
