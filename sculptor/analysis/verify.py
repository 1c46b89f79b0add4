"""Proof, from files alone, that an update left the protected pairs untouched.

Per matrix, in float64: leak = ||frozen part of dW|| / ||dW|| with dW = W' - W, against the rounding that storing
W' in its dtype explains: errors of variance ulp(W')^2 / 12 per entry, taken to the frozen pairs (`frozen_variance`).
It holds when leak <= sqrt(1e-6^2 + (1.25 rounding)^2). Where the archive has moments, the curvature that the update
touches, tr(G dW C dW^T), is set against what an update of its size in random directions would.

A checkpoint that went through several merges was rounded in each, to the dtype of each; its sculptor.json says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.analysis.factors import curvature_scales
from sculptor.analysis.weights import as_out_in, to_device
from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.store import Archive, Subspaces
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.records import read_record
from sculptor.errors import ArchiveError, VerificationError
from sculptor.numerics.bases import frozen_norm, frozen_variance
from sculptor.numerics.moments import Factor, curvature
from sculptor.numerics.rounding import leak_allowance, rounding_variance
from sculptor.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class MatrixVerification:
    """One matrix.

    Attributes:
        name, role: which.
        update: ||dW|| / ||W||.
        leak: ||frozen part of dW|| / ||dW||, 0 where dW is 0.
        rounding: the leak that rounding alone explains, same unit.
        eaten: expected ||rounding error|| / ||dW||: the share of the update that rounding ate, at most 1.
        holds: whether the leak is explained.
        kept: share of the archive's curvature that the update stayed out of, against one of its size in random
            directions; negative if it touches more than that, None without moments.
    """

    name: str
    role: str
    update: float
    leak: float
    rounding: float
    eaten: float
    holds: bool
    kept: float | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify`.

    Attributes:
        passed: every matrix holds, and everything else is untouched.
        leak: over all matrices together, ||frozen parts|| / ||updates||; `rounding` likewise.
        max_leak: of the matrix with the largest.
        eaten: share of the whole update that rounding ate.
        num_targets: matrices of the archive.
        num_changed: those with an update.
        untouched_identical: every other tensor has the same bytes (after the cast, where the dtype was changed).
        num_untouched: how many those are.
        changed_elsewhere: tensors outside the archive that changed without being declared.
        also_trained: tensors that the run itself declares as trained without protection.
        num_merges: how often the tuned checkpoint was rounded since the base.
        cast: dtype everything was cast to, None if dtypes are the same.
        matrices: one by one.
        kept: of the archive's curvature over all matrices; None without moments.
    """

    passed: bool
    leak: float
    max_leak: float
    rounding: float
    eaten: float
    num_targets: int
    num_changed: int
    untouched_identical: bool
    num_untouched: int
    changed_elsewhere: tuple[str, ...]
    also_trained: tuple[str, ...]
    num_merges: int
    cast: str | None
    matrices: tuple[MatrixVerification, ...]
    kept: float | None = None


@dataclass(frozen=True, slots=True)
class LeakMeasure:
    """Norms of one matrix's update: of all of it, of its frozen part, and of the rounding to expect in both.

    With moments also `touched`, tr(G dW C dW^T), and `touched_at_random`, its mean over all updates of that norm.
    """

    update: float
    frozen: float
    rounding: float
    frozen_rounding: float
    touched: float | None = None
    touched_at_random: float | None = None


def measure_leak(
    base: Tensor,
    tuned: Tensor,
    subspaces: Subspaces,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    factors: tuple[Factor | None, Factor] | None = None,
) -> LeakMeasure:
    """Measures one matrix, both given as stored.

    Args:
        base, tuned: before and after.
        subspaces: the archive's entry.
        device: where the float64 products run.
        dtypes: what the tuned one was rounded to, once each.
        factors: the moments G and C, if the archive has any.
    """
    record = subspaces.record
    base64 = to_device(base, record.transposed, device)
    update64 = to_device(tuned, record.transposed, device) - base64
    output = subspaces.output and subspaces.output.to(device, torch.float64)
    input = subspaces.input and subspaces.input.to(device, torch.float64)
    variance = as_out_in(rounding_variance(tuned, dtypes).to(device), record.transposed)
    touched = at_random = None
    if factors is not None:
        g, c = factors
        touched = curvature(update64, g, c)
        at_random = float(update64.square().sum()) * c.trace / c.dim * (1.0 if g is None else g.trace / g.dim)
    return LeakMeasure(
        update=float(update64.norm()),
        frozen=frozen_norm(update64, record.staircase, output, input),
        rounding=math.sqrt(float(variance.sum())),
        frozen_rounding=math.sqrt(frozen_variance(variance, record.staircase, output, input)),
        touched=touched,
        touched_at_random=at_random,
    )


def verify_checkpoints(
    base: Checkpoint,
    tuned: Checkpoint,
    archive: Archive,
    *,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Verification:
    """Checks a tuned checkpoint against its base and an archive of the base.

    Raises:
        VerificationError: if it cannot be carried out: the archive is not of `base`, or tensors do not match.
    """
    try:
        archive.check_base(base, progress)
    except ArchiveError as cause:
        raise VerificationError(str(cause)) from cause
    _check_same_tensors(base, tuned, archive)
    record = read_record(tuned.path)
    merges = record.merges_since({name: archive[name].base_digest for name in archive})
    matrices, squares, touched, at_random = [], [0.0, 0.0, 0.0, 0.0], 0.0, 0.0
    device = device or torch.device("cpu")
    weights = archive.manifest.source_weights
    scales = dict(zip(archive, curvature_scales(list(archive.values()), weights), strict=True)) if weights else {}
    bar = progress(total=len(archive), desc="verify", unit="matrix")
    for name in archive:
        before = base[name]
        dtypes = [getattr(torch, merge.dtypes[name]) for merge in merges if name in merge.dtypes]
        found = archive.read(name)
        factors = archive.factors(name, found) if found.record.has_moments else None
        measured = measure_leak(before, tuned.read_finite(name), found, device, dtypes, factors)
        if measured.touched is not None and measured.touched_at_random is not None:
            touched += scales[name] * measured.touched
            at_random += scales[name] * measured.touched_at_random
        for i, value in enumerate((measured.update, measured.frozen, measured.rounding, measured.frozen_rounding)):
            squares[i] += value**2 if measured.update else 0.0
        matrices.append(_judge(archive[name], measured, before))
        bar.update(1)
    bar.close()
    changed, num_untouched = _compare_rest(base, tuned, {*archive, *record.also_trained}, record.save_dtype)
    update, frozen, eaten, rounding = (value**0.5 for value in squares)
    scale = update or 1.0
    cast = {str(tuned.infos[name].dtype) for name in tuned if tuned.infos[name].dtype != base.infos[name].dtype}
    return Verification(
        passed=all(matrix.holds for matrix in matrices) and not changed,
        leak=frozen / scale,
        max_leak=max(matrix.leak for matrix in matrices),
        rounding=rounding / scale,
        eaten=min(1.0, eaten / scale),
        num_targets=len(matrices),
        num_changed=sum(matrix.update > 0 for matrix in matrices),
        untouched_identical=not changed,
        num_untouched=num_untouched,
        changed_elsewhere=tuple(changed),
        also_trained=record.also_trained,
        num_merges=max(1, len(merges)),
        cast=", ".join(sorted(cast)).replace("torch.", "") or None,
        matrices=tuple(matrices),
        kept=1 - touched / at_random if at_random else None,
    )


def _judge(record: MatrixRecord, measured: LeakMeasure, base: Tensor) -> MatrixVerification:
    if measured.update == 0:
        return MatrixVerification(record.name, record.role, 0.0, 0.0, 0.0, 0.0, True)
    leak, expected = measured.frozen / measured.update, measured.frozen_rounding / measured.update
    return MatrixVerification(
        record.name,
        record.role,
        update=measured.update / (float(base.to(torch.float64).norm()) or 1.0),
        leak=leak,
        rounding=expected,
        eaten=min(1.0, measured.rounding / measured.update),
        holds=leak <= leak_allowance(expected, record.staircase.num_frozen),
        kept=1 - measured.touched / measured.touched_at_random
        if measured.touched is not None and measured.touched_at_random
        else None,
    )


def _check_same_tensors(base: Checkpoint, tuned: Checkpoint, archive: Archive) -> None:
    missing = sorted(set(base.infos) - set(tuned.infos))
    added = sorted(set(tuned.infos) - set(base.infos))
    if missing or added:
        raise VerificationError(
            f"{tuned.path}: tensors differ from {base.path}: {len(missing)} missing, {len(added)} added, "
            f"first {(missing + added)[0]}; compare a checkpoint with its own base"
        )
    for name in archive:
        if not tuned.infos[name].dtype.is_floating_point:
            raise VerificationError(f"{tuned.path}: {name} holds {tuned.infos[name].dtype}; expected floating point")
    for name, info in base.infos.items():
        if tuned.infos[name].shape != info.shape:
            raise VerificationError(
                f"{tuned.path}: {name} has shape {list(tuned.infos[name].shape)}, {list(info.shape)} in {base.path}"
            )


def _compare_rest(
    base: Checkpoint, tuned: Checkpoint, targets: set[str], save_dtype: str | None
) -> tuple[list[str], int]:
    """Names outside the targets whose bytes differ, and how many were compared.

    A cast is allowed where it loses nothing, or where the run's own record declares it.
    """
    rest = [name for name in base if name not in targets]
    return [name for name in rest if not _same(base[name], tuned[name], save_dtype)], len(rest)


# Casts of floating-point numbers that lose nothing.
_LOSSLESS = {
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}


def _same(base: Tensor, tuned: Tensor, save_dtype: str | None) -> bool:
    if base.dtype != tuned.dtype:
        declared = save_dtype is not None and tuned.dtype == getattr(torch, save_dtype, None)
        if not declared and (base.dtype, tuned.dtype) not in _LOSSLESS:
            return False
        base = base.to(tuned.dtype)
    return torch.equal(base.reshape(-1).view(torch.uint8), tuned.reshape(-1).view(torch.uint8))
