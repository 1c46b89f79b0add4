"""How a checkpoint came from its base, as far as it can be believed.

What a checkpoint's own record says may explain what its tensors show; it excuses nothing that the archive that was carried
along does not say, too, and no rounding coarser than what is stored on either side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sculptor.archive.places import CARRIED
from sculptor.archive.store import Archive
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.records import Merge, read_record
from sculptor.errors import SculptorError


@dataclass(frozen=True, slots=True)
class Lineage:
    """The merges between a base and a checkpoint that are believed.

    Attributes:
        merges: oldest first; one, without a record of any.
        opened: tensors that were trained without protection in them.
        claimed: how many merges the checkpoint's own record tells of.
        claimed_open: whether it tells of tensors that were trained without protection.
        doubt: why not all of that is believed, None if it is.
    """

    merges: tuple[Merge, ...]
    opened: frozenset[str]
    claimed: int
    claimed_open: bool
    doubt: str | None

    def dtypes(self, name: str, base: torch.dtype, stored: torch.dtype) -> list[torch.dtype]:
        """What a matrix was rounded to, once each: in the end what it is stored in, before nothing coarser than it or its base."""
        coarsest = max(base, stored, key=_coarseness)
        told = [_dtype_of(merge, name) or stored for merge in self.merges[:-1]]
        return [*(min(dtype, coarsest, key=_coarseness) for dtype in told), stored]

    def declares(self, name: str, stored: torch.dtype) -> bool:
        """Whether one of the merges wrote a matrix in a dtype."""
        return any(_dtype_of(merge, name) == stored for merge in self.merges)

    @property
    def written(self) -> frozenset[str]:
        """All dtypes that some merge wrote matrices in."""
        return frozenset(dtype for merge in self.merges for dtype in merge.dtypes.values())


def _dtype_of(merge: Merge, name: str) -> torch.dtype | None:
    """The record's reader has checked that it is one."""
    return getattr(torch, merge.dtypes[name]) if name in merge.dtypes else None


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def trace_lineage(tuned: Checkpoint, archive: Archive, digests: Mapping[str, str] | None = None) -> Lineage:
    """The believable merges between the archive's checkpoint and another.

    Args:
        tuned: the other.
        archive: of the base.
        digests: SHA-256 of the other's matrices, by the archive's names; without them, the archive that was carried along is
            supposed to be of these.
    """
    record = read_record(tuned.path)
    claimed = record.merges_since({name: archive[name].base_digest for name in archive})
    tasks, doubt = _carried_tasks(tuned, archive, digests)
    allowed = len(tasks) if doubt is None else 1
    if doubt is None and len(claimed) > allowed:
        doubt = f"its archive tells of {allowed}"
    merges = claimed[len(claimed) - min(len(claimed), max(allowed, 1)) :]
    told = [frozenset(opened) for opened in tasks[len(tasks) - len(merges) :]] if merges else []
    opened = {name for merge, names in zip(merges, told, strict=False) for name in merge.opened if name in names}
    claimed_open = any(merge.opened for merge in claimed)
    return Lineage(merges, frozenset(opened), len(claimed), claimed_open, doubt)


def _carried_tasks(
    tuned: Checkpoint, archive: Archive, digests: Mapping[str, str] | None
) -> tuple[Sequence[tuple[str, ...]], str | None]:
    """What each training since opened, by the archive in the checkpoint's directory; or why that says nothing."""
    path = tuned.path / CARRIED
    if not (path / "archive.json").is_file():
        return [], f"there is no {CARRIED}/archive.json beside it"
    try:
        carried = Archive(path, rules=archive.own_kinds)
    except SculptorError as cause:
        return [], f"its archive cannot be read ({cause})"
    if digests is not None and any(
        name in digests and record.base_digest != digests[name] for name, record in carried.items()
    ):
        return [], f"the archive in {CARRIED}/ is not of these matrices"
    before, after = archive.manifest.tasks, carried.manifest.tasks
    start = len(before) if after[: len(before)] == before else 0
    return [task.opened for task in after[start:] if task.kind == "training"], None
