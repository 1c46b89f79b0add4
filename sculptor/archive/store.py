"""Reading and writing archives: lazy, atomic, checked."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sculptor.archive.manifest import Manifest, MatrixRecord, SideRecord, StoredTensor, matrix_from_json
from sculptor.checkpoint.reader import Checkpoint, identity
from sculptor.checkpoint.staging import LOCK_NAME, write_json, writing
from sculptor.checkpoint.tensors import digest, read_header, read_tensor
from sculptor.errors import ArchiveError, OutputError
from sculptor.numerics.bases import Basis
from sculptor.numerics.linalg import orthonormality_error
from sculptor.progress import Progress, silent

MANIFEST_NAME = "archive.json"
PROGRESS_NAME = "progress.json"
# A buffer of this size is the price of a shard; small, because analysis promises little memory.
MAX_SHARD_BYTES = 512 * 2**20
# float32 rounding of an orthonormal basis is near 1e-7; a basis this far off was not written by us.
ORTHONORMAL_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False, slots=True)
class Subspaces:
    """One matrix's stored directions, read into memory."""

    record: MatrixRecord
    output: Basis | None
    input: Basis | None


class Archive(Mapping[str, MatrixRecord]):
    """A subspace archive: records by matrix name, tensors read when asked for.

    Args:
        path: the archive's directory.

    Raises:
        ArchiveError: if it is missing, truncated, of another version, or inconsistent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST_NAME
        if not file.is_file():
            inside = self.path / "subspaces" / MANIFEST_NAME
            hint = f"; the archive is in {inside.parent}" if inside.is_file() else ""
            raise ArchiveError(f"{self.path}: no {MANIFEST_NAME}; expected a subspace archive{hint}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as cause:
            raise ArchiveError(f"{file}: truncated or corrupt ({cause}); run `sculptor analyze` again") from cause
        self.manifest = Manifest.from_json(content, file)
        self._check_files()

    def _check_files(self) -> None:
        for name, size in self.manifest.files.items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, expected {size}"
                raise ArchiveError(f"{file}: {state}; run `sculptor analyze` again")
            infos, _ = read_header(file, ArchiveError)
            for tensor, stored in self.manifest.tensors.items():
                if stored.file == name and (tensor not in infos or infos[tensor].shape != stored.shape):
                    raise ArchiveError(
                        f"{file}: tensor {tensor} is not what the manifest says; run `sculptor analyze` again"
                    )

    def __getitem__(self, name: str) -> MatrixRecord:
        return self.manifest.matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.matrices)

    def __len__(self) -> int:
        return len(self.manifest.matrices)

    @property
    def num_bytes(self) -> int:
        """Size of its shards."""
        return sum(self.manifest.files.values())

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, its digest checked.

        Raises:
            ArchiveError: if its bytes are not those that were written.
        """
        stored = self.manifest.tensors[name]
        tensor = read_tensor(self.path / stored.file, name, ArchiveError)
        if digest(tensor) != stored.sha256:
            raise ArchiveError(
                f"{self.path / stored.file}: tensor {name} has changed since it was written (its digest differs); "
                "run `sculptor analyze` again"
            )
        return tensor

    def read(self, name: str) -> Subspaces:
        """The stored sides of one matrix, checked: digest, finite, orthonormal.

        Raises:
            ArchiveError: if a check fails.
        """
        record = self[name]
        return Subspaces(record, self._side(name, record.output), self._side(name, record.input))

    def _side(self, name: str, side: SideRecord | None) -> Basis | None:
        if side is None:
            return None
        vectors = self.tensor(side.tensor)
        if not bool(vectors.isfinite().all()):
            raise ArchiveError(
                f"{self.path}: basis {side.tensor} has NaN or infinite values; run `sculptor analyze` again"
            )
        error = orthonormality_error(vectors, torch.Generator().manual_seed(0))
        if not error <= ORTHONORMAL_TOLERANCE:
            raise ArchiveError(
                f"{self.path}: basis {side.tensor} is not orthonormal (error {error:.1e}, at most "
                f"{ORTHONORMAL_TOLERANCE:.0e}); run `sculptor analyze` again"
            )
        return Basis(vectors, side.form)

    def spectrum(self, name: str) -> Tensor | None:
        """All singular values of one matrix at analysis, descending."""
        tensor = self[name].spectrum
        return None if tensor is None else self.tensor(tensor)

    def check_base(self, checkpoint: Checkpoint, progress: Progress = silent) -> None:
        """Checks that every matrix of the archive is, byte for byte, the one in `checkpoint`.

        Raises:
            ArchiveError: if one is missing, of another shape, or other bytes.
        """
        absent = [name for name in self if name not in checkpoint.infos]
        if absent:
            raise ArchiveError(
                f"{self.path}: archive covers {len(self)} matrices, {len(absent)} of them are not in {checkpoint.path} "
                f"(first {absent[0]}); run `sculptor analyze` on this checkpoint"
            )
        for name, record in self.items():
            expected = record.shape[::-1] if record.transposed else record.shape
            found = checkpoint.infos[name].shape
            if found != expected:
                raise ArchiveError(
                    f"{self.path}: {name} is {list(expected)} in the archive and {list(found)} in {checkpoint.path}; "
                    "run `sculptor analyze` on this checkpoint"
                )
        different = []
        bar = progress(total=len(self), desc="check base", unit="matrix")
        for name, record in self.items():
            if digest(checkpoint[name]) != record.base_digest:
                different.append(name)
            bar.update(1)
        bar.close()
        if different:
            carried = checkpoint.path / "subspaces"
            remedy = f"use {carried}" if carried.is_dir() else "run `sculptor analyze` on this checkpoint"
            raise ArchiveError(
                f"{self.path}: archive of another checkpoint: {len(different)} of {len(self)} matrices differ from "
                f"{checkpoint.path}, first {different[0]}; {remedy}"
            )


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

    def record(self, name: str) -> MatrixRecord:
        """A record that was added."""
        return self._pending_records.get(name) or self.records[name]

    def _keep(self, name: str, basis: Basis | None) -> SideRecord | None:
        if basis is None:
            return None
        self._pending[name] = basis.vectors.to("cpu", self.dtype).contiguous()
        return SideRecord(name, basis.form, basis.directions)

    def _write_shard(self) -> None:
        if self._pending:
            name = f"subspaces-{len(self._shards) + 1:05d}.safetensors"
            save_tensors(self._pending, self.directory / name)
            for key, tensor in self._pending.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                self.tensors[key] = StoredTensor(name, dtype, tuple(tensor.shape), digest(tensor))
            self._shards.append(name)
            self._pending = {}
        self.records |= self._pending_records
        self._pending_records = {}
        write_json(
            self.directory / PROGRESS_NAME,
            {
                "key": self.key,
                "shards": self._shards,
                "records": {name: asdict(record) for name, record in self.records.items()},
                "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()},
            },
        )

    def finish(self, manifest: Manifest) -> None:
        """Writes the last shard and archive.json.

        `manifest` lacks tensors, files and identity; if it has matrices, they give the order.
        """
        self._write_shard()
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
    with writing(path):
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.replace(path)
