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
from sculptor.errors import VerificationError
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


def check_same_tensors(
    base: Checkpoint, tuned: Checkpoint, archive: Archive, growth: Growth | None, head: NewHead | None
) -> None:
    """Checks that both have the same tensors, but for rows of new tokens and a new head.

    Raises:
        VerificationError: naming the first that differs.
    """
    dropped, fresh = (head.dropped, set(head.fresh)) if head else (frozenset(), set())
    missing = sorted(set(base.infos) - set(tuned.infos) - dropped)
    added = sorted(set(tuned.infos) - set(base.infos) - fresh)
    if missing or added:
        remedy = "compare a checkpoint with its own base"
        if any(".parametrizations." in name for name in added):
            remedy = (
                "it was saved while it was protected, with coordinates beside the weights: use its folder merged/ or the "
                "callback's output, or call sculptor.merge(model) before it is saved"
            )
        raise VerificationError(
            f"{tuned.path}: tensors differ from {base.path}: {len(missing)} missing, {len(added)} added, "
            f"first {(missing + added)[0]}; {remedy}"
        )
    for record in archive.values():
        dtype = tuned.infos[record.tensor].dtype
        if not dtype.is_floating_point:
            raise VerificationError(f"{tuned.path}: {record.tensor} holds {dtype}; expected floating point")
    for name, info in base.infos.items():
        if name in dropped:
            continue
        shape = (growth.after, *info.shape[1:]) if growth and name in growth.names else info.shape
        if tuned.infos[name].shape != shape:
            found = list(tuned.infos[name].shape)
            raise VerificationError(f"{tuned.path}: {name} has shape {found}, {list(info.shape)} in {base.path}")
