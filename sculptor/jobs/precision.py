"""How sure bayes-adam is of each trained number, kept in an archive's section from task to task.

Tensors `<name>.precision`, float32, of coordinates and openly trained parameters, and `<matrix>.fingerprint` of the bases
that coordinates are in: elsewhere completed otherwise, they would be of other directions.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sculptor.archive.store import Archive
from sculptor.archive.writer import ArchiveWriter
from sculptor.edits.merge import same_fingerprint
from sculptor.errors import ArchiveError
from sculptor.training.stepping.optimizer import MOMENTS, PRECISION
from sculptor.training.stepping.updates import LazyTensors, Trained, Updates

SECTION = "optimizer"
_SUFFIX, _MARK = f".{PRECISION}", ".fingerprint"


class _Start(Mapping[str, Tensor]):
    """The state of an optimizer before its first step, that knows precisions."""

    def __init__(self, parameters: LazyTensors, known: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._known = known
        self._names = [name for name in parameters.entries if name + _SUFFIX in known]
        kept = (".step", *("." + moment for moment in MOMENTS), _SUFFIX)
        self._keys = {*parameters.entries, *(name + suffix for name in self._names for suffix in kept)}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        if key in self._parameters.entries:
            return self._parameters.read(key)
        name, _, kept = key.rpartition(".")
        if kept == "step":
            return torch.zeros(())
        return self._known[key] if kept == PRECISION else torch.zeros(self._parameters.entries[name][1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def load_precision(archive: Archive, updates: Updates) -> None:
    """Has the optimizer go on from what earlier tasks made sure; what they did not train starts anew.

    Raises:
        ArchiveError: if the section is damaged, or of other bases.
    """
    known = archive.section_tensors(SECTION)
    if known is None:
        return
    parameters = updates.parameters()
    for name, (_, shape) in parameters.entries.items():
        if name + _SUFFIX in known and known.shape(name + _SUFFIX) != shape:
            raise ArchiveError(f"{archive.path}: its precision of {name} is of another shape; {_REMEDY}")
    for name, mark in updates.fingerprints().items():
        if name + _MARK in known and not same_fingerprint(known[name + _MARK].tolist(), mark):
            raise ArchiveError(
                f"{archive.path}: its precision of {name} is of other bases (this library or device completes them "
                f"differently); {_REMEDY}"
            )
    updates.load(_Start(parameters, known), optimizer=True)


_REMEDY = "go on where it was trained, or use an archive without it"


def write_precision(writer: ArchiveWriter, archive: Archive, updates: Trained) -> None:
    """Writes what is known after a task; of what it did not train, what was known before."""
    found = updates.precision()
    marks = {name + _MARK: torch.tensor(mark, dtype=torch.float64) for name, mark in updates.fingerprints().items()}
    old: Mapping[str, Tensor] = archive.section_tensors(SECTION) or {}
    earlier = {name: old[name] for name in old if name not in found.entries and name not in marks}
    small = earlier | marks
    entries = dict(found.entries) | {name: (value.dtype, tuple(value.shape)) for name, value in small.items()}
    writer.add_tensors(SECTION, entries, lambda name: small[name] if name in small else found.read(name))
