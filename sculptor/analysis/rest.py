"""What of a checkpoint is no matrix of an archive: compared byte for byte, but for casts and rows of new tokens."""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor

from sculptor.analysis.lineage import Lineage
from sculptor.archive.store import Archive
from sculptor.checkpoint.heads import NewHead
from sculptor.checkpoint.reader import Checkpoint, Slice
from sculptor.checkpoint.tensors import dtype_name
from sculptor.checkpoint.vocabulary import Growth, are_outsized
from sculptor.numerics.finite import is_finite

_PIECE = 8192  # rows of a large tensor that are compared at once


def compare_rest(
    base: Checkpoint,
    tuned: Checkpoint,
    archive: Archive,
    lineage: Lineage,
    growth: Growth | None,
    head: NewHead | None = None,
) -> tuple[list[str], int]:
    """Names outside the archive that differ from what they have to be, and how many were compared byte for byte.

    Of a tensor some slices of which are in the archive, the others are compared. A cast is allowed where it loses nothing,
    or where everything was cast alike and a merge declares it. Of a tensor with rows for new tokens, all others are compared.
    A new head may be anything that is a number.
    """
    parts: dict[str, set[int | None]] = defaultdict(set)
    for record in archive.values():
        parts[record.tensor].add(record.part)
    rest: list[Slice] = []
    for name, info in base.infos.items():
        if name in lineage.opened or None in parts[name] or (head and name in head.dropped):
            continue
        rest += [Slice(name, i) for i in range(info.shape[0]) if i not in parts[name]] if parts[name] else [Slice(name)]
    stored = {info.dtype for info in tuned.infos.values() if info.dtype.is_floating_point}
    declared = {dtype for dtype in stored if len(stored) == 1 and dtype_name(dtype) in lineage.written}
    for name in head.fresh if head else ():
        tuned.read_finite(name)
    grown = growth.names if growth else frozenset()
    changed = [
        of.name for of in rest if of.tensor not in grown and not _same(base.matrix(of), tuned.matrix(of), declared)
    ]
    if growth is not None:
        changed += [of.tensor for of in rest if of.tensor in grown and not _grew(base, tuned, of, growth, declared)]
    return changed + _unfit(base, tuned, lineage, declared), len(rest)


def _grew(base: Checkpoint, tuned: Checkpoint, of: Slice, growth: Growth, declared: Collection[torch.dtype]) -> bool:
    """Whether all old rows are as they were; new ones may have any value that is a number and no giant."""
    tuned.check_finite(of, tuned.rows(of.tensor, growth.start, growth.stop))
    pieces = ((i, min(i + _PIECE, stop)) for start, stop in growth.old_rows() for i in range(start, stop, _PIECE))
    same = all(_same(base.rows(of.tensor, *piece), tuned.rows(of.tensor, *piece), declared) for piece in pieces)
    return same and not are_outsized(tuned, of.tensor, growth)


def _unfit(base: Checkpoint, tuned: Checkpoint, lineage: Lineage, declared: Collection[torch.dtype]) -> list[str]:
    """Of the openly trained tensors, those of a dtype that nobody declares; any value is allowed, if it is a number."""
    found = []
    for name in sorted(lineage.opened & base.infos.keys() & tuned.infos.keys()):
        before, now = base.infos[name].dtype, tuned.infos[name].dtype
        tuned.read_finite(name)
        if not (before == now or now in declared or (now.is_floating_point and lossless(before, now))):
            found.append(name)
    return found


def lossless(base: torch.dtype, tuned: torch.dtype) -> bool:
    """Whether a cast of floating-point numbers loses nothing."""
    narrow, wide = torch.finfo(base), torch.finfo(tuned)
    return base == tuned or (wide.eps <= narrow.eps and wide.max >= narrow.max and wide.tiny <= narrow.tiny)


def _same(base: Tensor, tuned: Tensor, declared: Collection[torch.dtype]) -> bool:
    if base.dtype != tuned.dtype:
        if not (base.is_floating_point() and tuned.is_floating_point()):
            return False
        before, base = base, base.to(tuned.dtype)
        if not lossless(before.dtype, tuned.dtype) and (
            tuned.dtype not in declared or (is_finite(before) and not is_finite(base))
        ):
            return False
    return torch.equal(base.reshape(-1).view(torch.uint8), tuned.reshape(-1).view(torch.uint8))
