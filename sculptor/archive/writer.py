"""Writing archives: one matrix at a time, in shards that a killed run can be taken up behind."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculptor.archive.manifest import Manifest, MatrixRecord, SideRecord, StoredTensor, matrix_from_json
from sculptor.archive.store import MANIFEST_NAME
from sculptor.checkpoint.reader import identity
from sculptor.checkpoint.staging import LOCK_NAME, write_json, writing
from sculptor.checkpoint.tensors import digest, read_tensor, write_tensors
from sculptor.errors import OutputError
from sculptor.numerics.bases import Basis
from sculptor.numerics.moments import Factor

PROGRESS_NAME = "progress.json"
# Two buffers of this size are the price: one shard fills up while the one before is hashed and written by a thread.
# Small, because analysis promises little memory.
MAX_SHARD_BYTES = 256 * 2**20


def has_progress(directory: Path) -> bool:
    """Whether a staging directory holds complete shards."""
    return (directory / PROGRESS_NAME).is_file()


class ArchiveWriter:
    """Fills a directory with an archive, one matrix at a time; `finish` writes the manifest.

    Shards are written as they fill up, and what they hold is noted in progress.json, so a killed run that is
    taken up again with the same `key` goes on behind the last complete shard.

    Args:
        directory: an existing directory, staged by the caller.
        dtype: of the bases.
        key: what has to be the same for earlier shards to be of use.
        max_shard_bytes: size at which a shard is written.
    """

    def __init__(
        self, directory: Path, dtype: torch.dtype, key: Mapping[str, Any], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.directory = directory
        self.dtype = dtype
        self.key = json.loads(json.dumps(key))
        self.max_shard_bytes = max_shard_bytes
        self.records: dict[str, MatrixRecord] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_records: dict[str, MatrixRecord] = {}
        self._shards: list[str] = []
        self._sides: dict[str, SideRecord] = {}  # sides with moments, by their tensor
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._in_flight: tuple[Future[None], dict[str, Tensor], dict[str, MatrixRecord]] | None = None

    def resume(self) -> None:
        """Takes up complete shards of a killed run; anything else in the directory goes.

        Raises:
            OutputError: if they were made with another key.
        """
        progress = self.directory / PROGRESS_NAME
        try:
            content = json.loads(progress.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        if content.get("key") == self.key:
            self.records = {name: matrix_from_json(record) for name, record in content["records"].items()}
            self.tensors = {
                name: StoredTensor(**(tensor | {"shape": tuple(tensor["shape"])}))
                for name, tensor in content["tensors"].items()
            }
            self._shards = list(content["shards"])
            sides = [side for record in self.records.values() for side in (record.output, record.input)]
            self._sides = {side.tensor: side for side in sides if side is not None and side.values is not None}
        elif content:
            different = sorted(name for name in self.key if content["key"].get(name) != self.key[name])
            raise OutputError(
                f"{progress}: left by a run with other inputs or settings ({', '.join(different)}); use the same or pass "
                "--overwrite to start anew"
            )
        kept = {*self._shards, PROGRESS_NAME, LOCK_NAME} if self._shards else {LOCK_NAME}
        for file in self.directory.iterdir():
            if file.name not in kept:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def add(self, record: MatrixRecord, output: Basis | None, input: Basis | None, spectrum: Tensor | None) -> None:
        """Takes one matrix; the record's sides and spectrum are filled in here."""
        record = replace(
            record,
            output=self._keep(f"{record.name}.output", output),
            input=self._keep(f"{record.name}.input", input),
            spectrum=None if spectrum is None else f"{record.name}.spectrum",
        )
        if spectrum is not None:
            self._pending[f"{record.name}.spectrum"] = spectrum.to("cpu", torch.float32).contiguous()
        self._pending_records[record.name] = record
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self.max_shard_bytes:
            self._write_shard()

    def add_factors(
        self,
        record: MatrixRecord,
        output: tuple[Factor, Tensor] | None,
        input: tuple[Factor, Tensor],
    ) -> None:
        """Takes one matrix with moments, each side with the profiles of its tasks; the steps may follow later."""
        record = replace(
            record,
            output=output and self._keep_factor(f"{record.name}.output", *output),
            input=self._keep_factor(f"{record.input_group}.input", *input),
        )
        self._pending_records[record.name] = record
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self.max_shard_bytes:
            self._write_shard()

    def update(self, record: MatrixRecord) -> None:
        """Replaces the facts of a matrix that was added; its tensors stay."""
        self._wait()
        known = self._pending_records if record.name in self._pending_records else self.records
        known[record.name] = record

    def all_records(self) -> list[MatrixRecord]:
        """Everything that was added."""
        self._wait()
        return [*self.records.values(), *self._pending_records.values()]

    def read(self, name: str) -> Tensor:
        """A tensor that was added."""
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

    def _keep(self, name: str, basis: Basis | None) -> SideRecord | None:
        if basis is None:
            return None
        self._pending[name] = basis.vectors.to("cpu", self.dtype).contiguous()
        return SideRecord(name, basis.form, basis.directions)

    def _keep_factor(self, name: str, factor: Factor, profiles: Tensor) -> SideRecord:
        if name not in self._sides:  # else another matrix reads the same input
            count = factor.values.numel()
            self._sides[name] = SideRecord(name, "leading", count, f"{name}.values", factor.rest, f"{name}.profiles")
            self._pending[name] = factor.vectors.to("cpu", self.dtype).contiguous()
            self._pending[f"{name}.values"] = factor.values.to("cpu", torch.float64).contiguous()
            self._pending[f"{name}.profiles"] = profiles.to("cpu", torch.float32).contiguous()
        return self._sides[name]

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
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.tensors[key] = StoredTensor(name, dtype, tuple(tensor.shape), digest(tensor))
            self._shards.append(name)
        self.records |= records
        write_json(
            self.directory / PROGRESS_NAME,
            {
                "key": self.key,
                "shards": self._shards,
                "records": {name: asdict(record) for name, record in self.records.items()},
                "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()},
            },
        )

    def close(self) -> None:
        """Lets the thread end; after an error nothing is written any more once this returns."""
        self._thread.shutdown(wait=True)

    def finish(self, manifest: Manifest) -> None:
        """Writes the last shard and archive.json.

        `manifest` lacks tensors, files and identity; if it has matrices, they give the order.
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
        )
        write_json(self.directory / MANIFEST_NAME, manifest.to_json())
        (self.directory / PROGRESS_NAME).unlink()


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
