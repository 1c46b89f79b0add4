"""Reading archives: lazy and checked."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sculptor.archive.manifest import Manifest, MatrixRecord, SideRecord
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tensors import digest, read_header, read_tensor
from sculptor.errors import ArchiveError
from sculptor.numerics.bases import Basis
from sculptor.numerics.linalg import orthonormality_error
from sculptor.numerics.moments import Factor
from sculptor.progress import Progress, silent

MANIFEST_NAME = "archive.json"
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

    def factors(self, name: str, found: Subspaces | None = None) -> tuple[Factor | None, Factor]:
        """The truncated moments (G or None, C) of one matrix, checked as its sides are; `found` if these are read already.

        Raises:
            ArchiveError: if a check fails, or the archive has no moments.
        """
        found = found or self.read(name)
        if not found.record.has_moments:
            raise ArchiveError(
                f"{self.path}: basis {self.manifest.basis} has no moments; analyze with --basis curvature"
            )
        output = self._factor(found.record.output, found.output)
        input = self._factor(found.record.input, found.input)
        assert input is not None
        return output, input

    def factor(self, name: str, side: SideRecord) -> Factor:
        """The truncated moment of one side of a matrix, checked as its basis is; the other side is not read."""
        found = self._factor(side, self._side(name, side))
        assert found is not None
        return found

    def _factor(self, side: SideRecord | None, basis: Basis | None) -> Factor | None:
        if side is None or basis is None:
            return None
        assert side.values is not None
        return Factor(basis.vectors, self.tensor(side.values), side.rest)

    def profiles(self, side: SideRecord | None) -> Tensor | None:
        """What each task has on the leading directions of a side: (tasks, 65) or fewer columns."""
        return None if side is None or side.profiles is None else self.tensor(side.profiles)

    def spectrum(self, name: str) -> Tensor | None:
        """All singular values of one matrix at analysis, descending."""
        tensor = self[name].spectrum
        return None if tensor is None else self.tensor(tensor)

    def check_names(self, checkpoint: Checkpoint) -> None:
        """Checks that `checkpoint` has every matrix of the archive, in its shape.

        Raises:
            ArchiveError: if one is missing or of another shape.
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

    def check_base(self, checkpoint: Checkpoint, progress: Progress = silent) -> None:
        """Checks that every matrix of the archive is, byte for byte, the one in `checkpoint`.

        Raises:
            ArchiveError: if one is missing, of another shape, or other bytes.
        """
        self.check_names(checkpoint)
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
            owner = self.path.resolve().parent
            if (owner / "config.json").is_file() and owner != checkpoint.path.resolve():
                remedy = f"it belongs to {owner}, for the task after; use the archive that was trained with"
            raise ArchiveError(
                f"{self.path}: archive of another checkpoint: {len(different)} of {len(self)} matrices differ from "
                f"{checkpoint.path}, first {different[0]}; {remedy}"
            )
