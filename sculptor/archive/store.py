"""Reading archives: lazy and checked."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from sculptor.archive.manifest import REMEDY, Manifest, MatrixRecord
from sculptor.archive.places import MANIFEST_NAME as MANIFEST_NAME
from sculptor.archive.places import hint, remedy
from sculptor.checkpoint.ahead import ReadAhead
from sculptor.checkpoint.reader import Checkpoint, identity
from sculptor.checkpoint.tensors import TensorInfo, digest, in_threads, read_header, read_known
from sculptor.errors import ArchiveError, CapacityError
from sculptor.methods.kinds import Kinds, known_kinds, make_method
from sculptor.methods.method import Method
from sculptor.methods.rule import Rule, is_open, num_free
from sculptor.numerics.finite import is_finite
from sculptor.numerics.linalg import orthonormal_prefixes, orthonormality_error
from sculptor.numerics.rounding import rms
from sculptor.progress import Progress, silent
from sculptor.validation import check_file, read_file

# float32 rounding of an orthonormal basis is near 1e-7; a basis this far off was not written by us. Bases in narrower
# dtypes are as far off as these, and made orthonormal again when they are read.
ORTHONORMAL_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}
_TOLERANCE = 1e-5


FileState = tuple[int, int, int]


def _state_of(file: Path) -> FileState | None:
    """What changes when a file is written to; None if it cannot be told."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _exact(vectors: Tensor) -> Tensor:
    """A basis as it is used: one in less than float32 made orthonormal, prefix by prefix."""
    return orthonormal_prefixes(vectors).float() if vectors.dtype.itemsize < 4 else vectors


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one matrix by its rule's names, read and checked when asked for, once."""

    def __init__(self, archive: "Archive", record: MatrixRecord) -> None:
        self._archive = archive
        self._record = record
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            stored = self._record.tensors[name]
            basis = name in self._record.rule.orthonormal
            self._read[name] = self._archive.take(stored) if basis else self._archive.tensor(stored)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._record.tensors)

    def __len__(self) -> int:
        return len(self._record.tensors)


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """One matrix of an archive: its record, and its tensors."""

    record: MatrixRecord
    tensors: Mapping[str, Tensor]

    @property
    def rule(self) -> Rule:
        """What may change in it."""
        return self.record.rule


class SectionTensors(Mapping[str, Tensor]):
    """The tensors of an optional part, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._infos, _ = read_header(path, ArchiveError)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one."""
        return self._infos[name].shape

    def __getitem__(self, name: str) -> Tensor:
        return read_known(self._path, name, self._infos[name], ArchiveError)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


class Archive(Mapping[str, MatrixRecord]):
    """A subspace archive: records by matrix name, tensors read when asked for.

    Args:
        path: the archive's directory.
        rules: kinds of rules beside sculptor's own.

    Raises:
        ArchiveError: if it is missing, truncated, of another version, or inconsistent.
    """

    def __init__(self, path: str | Path, *, rules: Kinds | None = None) -> None:
        self.path = Path(path)
        self.own_kinds = rules
        self.kinds = known_kinds(rules)
        file = self.path / MANIFEST_NAME
        if not file.is_file():
            raise ArchiveError(
                f"{self.path}: no {MANIFEST_NAME}; expected a subspace archive, as `sculptor analyze` makes{hint(self.path)}"
            )
        self.manifest = Manifest.from_json(read_file(file, ArchiveError, REMEDY), file, self.kinds)
        self._infos: dict[str, TensorInfo] = {}
        self._checked: dict[str, FileState] = {}  # digest
        self._sound: dict[str, FileState] = {}  # finite and orthonormal, too
        self.take: Callable[[str], Tensor] = self.basis  # or what has read it ahead
        self._check_files()

    def _check_files(self) -> None:
        sizes = {**self.manifest.files, **{part.file: part.num_bytes for part in self.manifest.sections.values()}}
        for name, size in sizes.items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, expected {size}"
                raise ArchiveError(f"{file}: {state}; {REMEDY}")
        for name in self.manifest.files:
            infos, _ = read_header(self.path / name, ArchiveError)
            for tensor, stored in self.manifest.tensors.items():
                if stored.file != name:
                    continue
                dtype = getattr(torch, stored.dtype)
                if tensor not in infos or (infos[tensor].shape, infos[tensor].dtype) != (stored.shape, dtype):
                    raise ArchiveError(f"{self.path / name}: tensor {tensor} is not what the manifest says; {REMEDY}")
                self._infos[tensor] = infos[tensor]

    def __getitem__(self, name: str) -> MatrixRecord:
        return self.manifest.matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.matrices)

    def __len__(self) -> int:
        return len(self.manifest.matrices)

    @property
    def num_bytes(self) -> int:
        """Size of its shards and sections."""
        return sum(self.manifest.files.values()) + sum(part.num_bytes for part in self.manifest.sections.values())

    @property
    def num_free(self) -> int:
        """Coordinates of all matrices."""
        return sum(num_free(record.rule) for record in self.values())

    @property
    def open_names(self) -> list[str]:
        """The matrices in which something may change."""
        return [name for name, record in self.items() if is_open(record.rule)]

    @functools.cached_property
    def method(self) -> Method:
        """What made its rules, and carries them on."""
        return make_method(self.manifest.settings, self.kinds)

    @property
    def identity(self) -> str:
        """One digest of its tensors and its rules: archives under other budgets share their tensors."""
        rules = {f"{name} rule": repr(record.rule) for name, record in self.items()}
        return identity({name: stored.sha256 for name, stored in self.manifest.tensors.items()} | rules)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, its digest checked.

        Raises:
            ArchiveError: if its bytes are not those that were written.
        """
        stored = self.manifest.tensors[name]
        seen = _state_of(self.path / stored.file)
        tensor = read_known(self.path / stored.file, name, self._infos[name], ArchiveError)
        if seen is not None and self._checked.get(name) == seen:  # read before, and not written to since
            return tensor
        if digest(tensor) != stored.sha256:
            raise ArchiveError(
                f"{self.path / stored.file}: tensor {name} has changed since it was written (its digest differs); {REMEDY}"
            )
        if seen is not None:
            self._checked[name] = seen
        return tensor

    def basis(self, name: str) -> Tensor:
        """A stored tensor with orthonormal columns, checked; one in less than float32 is made so, float32.

        What is protected are the spans of its leading columns, so any order-keeping orthonormal basis will do; it is
        found in float64 on the CPU, the same wherever it is then used.

        Raises:
            ArchiveError: if it has values that are not finite, or columns that are far from orthonormal.
        """
        known = self._checked.get(name)
        vectors = self.tensor(name)
        if known is not None and self._sound.get(name) == self._checked.get(name):
            return _exact(vectors)
        if not is_finite(vectors):
            raise ArchiveError(f"{self.path}: basis {name} has NaN or infinite values; {REMEDY}")
        error = orthonormality_error(vectors, torch.Generator().manual_seed(0))
        allowed = ORTHONORMAL_TOLERANCE.get(vectors.dtype, _TOLERANCE)
        if not error <= allowed:
            raise ArchiveError(
                f"{self.path}: basis {name} is not orthonormal (error {error:.1e}, at most {allowed:.0e}); {REMEDY}"
            )
        if name in self._checked:
            self._sound[name] = self._checked[name]
        return _exact(vectors)

    def read(self, name: str) -> Entry:
        """One matrix; its tensors are read and checked (digest, finite, orthonormal) when they are asked for."""
        record = self[name]
        return Entry(record, StoredTensors(self, record))

    @contextmanager
    def ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Within, threads read the bases of these matrices before they are asked for, in this order."""
        records = [self[name] for name in names]
        groups = [[stored for key, stored in r.tensors.items() if key in r.rule.orthonormal] for r in records]
        sizes = {stored: 4 * prod(self._infos[stored].shape) for group in groups for stored in group}
        ahead = ReadAhead(self.basis, groups, sizes)
        self.take, before = ahead.take, self.take
        try:
            yield
        finally:
            self.take = before
            ahead.close()

    def section(self, name: str) -> bytes | None:
        """An optional part; None if the archive has none of that name.

        Raises:
            ArchiveError: if its bytes are not those that were written.
        """
        part = self.manifest.sections.get(name)
        if part is None:
            return None
        content = read_file(self.path / part.file, ArchiveError, REMEDY)
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise ArchiveError(
                f"{self.path / part.file}: has changed since it was written (its digest differs); {REMEDY}"
            )
        return content

    def section_tensors(self, name: str) -> SectionTensors | None:
        """An optional part that is a file of tensors; None if the archive has none of that name.

        Raises:
            ArchiveError: if its bytes are not those that were written.
        """
        part = self.manifest.sections.get(name)
        if part is None:
            return None
        file = self.path / part.file
        check_file(file, part.sha256, ArchiveError, REMEDY)
        return SectionTensors(file)

    def check_capacity(self) -> None:
        """Checks that something may change.

        Raises:
            CapacityError: if nothing may.
        """
        if not self.open_names:
            raise CapacityError(f"{self.path}: no capacity left: all {len(self)} matrices are frozen")

    def check_names(self, checkpoint: Checkpoint) -> None:
        """Checks that `checkpoint` has every matrix of the archive, in its shape.

        Raises:
            ArchiveError: if one is missing or of another shape.
        """
        absent = [name for name, record in self.items() if not checkpoint.has(record)]
        if absent:
            raise ArchiveError(
                f"{self.path}: archive covers {len(self)} matrices, {len(absent)} of them are not in {checkpoint.path} "
                f"(first {absent[0]}); run `sculptor analyze` on this checkpoint"
            )
        for name, record in self.items():
            found = checkpoint.info_of(record).shape
            if found != record.stored_shape:
                raise ArchiveError(
                    f"{self.path}: {name} is {list(record.stored_shape)} in the archive and {list(found)} in "
                    f"{checkpoint.path}; run `sculptor analyze` on this checkpoint"
                )

    def note_rms(self, name: str, weight: Tensor) -> None:
        """Fills in what an archive of version 2 does not say of a matrix of its base."""
        if self[name].base_rms is None:
            self._note_rms(name, rms(weight))

    def _note_rms(self, name: str, size: float) -> None:
        matrices = {**self.manifest.matrices, name: replace(self[name], base_rms=size)}
        self.manifest = replace(self.manifest, matrices=matrices)

    def check_base(self, checkpoint: Checkpoint, progress: Progress = silent) -> None:
        """Checks that every matrix of the archive is, byte for byte, the one in `checkpoint`.

        Raises:
            ArchiveError: if one is missing, of another shape, or other bytes.
        """
        self.check_names(checkpoint)
        different = []
        with closing(progress(total=len(self), desc="check base", unit="matrix")) as bar:

            def look(name: str) -> tuple[str, float | None]:
                weight = checkpoint.matrix(self[name])
                return digest(weight), rms(weight) if self[name].base_rms is None else None

            names = list(self)
            for name, (found, size) in zip(names, in_threads(look, names), strict=True):
                if found != self[name].base_digest:
                    different.append(name)
                if size is not None:
                    self._note_rms(name, size)
                bar.update(1)
        if different:
            raise ArchiveError(
                f"{self.path}: archive of another checkpoint: {len(different)} of {len(self)} matrices differ from "
                f"{checkpoint.path}, first {different[0]}; {remedy(self.path, checkpoint.path)}"
            )
