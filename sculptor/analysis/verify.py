"""Proof, from files alone, that an update did nothing that its matrix's rule forbids.

Per matrix, in float64: leak = ||what the rule forbids of dW|| / ||dW|| with dW = W' - W, against the rounding that storing
W' in its dtype explains: errors of variance ulp(W')^2 / 12 per entry, as far as the rule forbids them (`Rule.violation`).
It holds when leak <= sqrt(1e-6^2 + (1.25 rounding)^2), and when no direction of it stands out of what errors without a
direction can make. Where a rule weighs directions, what the update touches of them is set against what an update of its
size in random directions would.

How many merges are believed is in `analysis.lineage`; what is loaded beside tensors is compared in `checkpoint.sameness`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sculptor.analysis.leak import LeakMeasure, measure_leak
from sculptor.analysis.lineage import Lineage, trace_lineage
from sculptor.analysis.rest import check_same_tensors, compare_rest, lossless
from sculptor.analysis.roundings import rounds_an_allowed
from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.places import OPENED
from sculptor.archive.store import Archive
from sculptor.checkpoint.heads import NewHead, find_new_head
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.renamed import Common, in_common_names, notes_of
from sculptor.checkpoint.sameness import differences
from sculptor.checkpoint.tensors import digest
from sculptor.checkpoint.tokenizers import notes_of_calls
from sculptor.checkpoint.vocabulary import Growth, find_growth
from sculptor.errors import ArchiveError, VerificationError
from sculptor.model.harm import Harm, NamedHarm
from sculptor.numerics.rounding import leak_allowance, peak_allowance
from sculptor.progress import Progress, silent
from sculptor.world import ALONE, World

# The largest leak that passes strictly: a tenth of a percent of the update.
STRICT_LEAK = 1e-3
# Of ||W||, what may move of protected pairs, whatever explains it: ten times what rounding to bf16 does.
MOST_MOVED = 2e-2


@dataclass(frozen=True, slots=True)
class MatrixVerification:
    """One matrix.

    Attributes:
        name, role: which.
        update: ||dW|| / ||W||.
        leak: ||frozen part of dW|| / ||dW||, 0 where dW is 0.
        rounding: the leak that rounding alone explains, same unit.
        eaten: expected ||rounding error|| / ||dW||: the share of the update that rounding ate, at most 1.
        peak: the largest direction of the leak over what rounding explains of one; None where the rule does not tell.
        holds: whether the leak is explained, in all and in every direction.
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
    peak: float | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify`.

    Attributes:
        passed: every matrix holds, and everything else that a user loads is untouched.
        leak: over all matrices together, ||frozen parts|| / ||updates||; `rounding` likewise; `max_leak` of the largest.
        eaten: share of the whole update that rounding ate.
        num_targets: matrices of the archive.
        num_changed: those with an update.
        untouched_identical: every other tensor has the same bytes (after the cast, where the dtype was changed).
        num_untouched: how many those are.
        changed_elsewhere: tensors outside the archive that changed without being declared.
        differences: in configuration, tokenizer or files, that make another model of the same tensors.
        also_trained: tensors that were trained without protection, by the record and by the archive of the output.
        num_merges: how often the tuned checkpoint was rounded since the base, as far as that is believed.
        num_claimed: how often its own record says, and `doubt` why not all of that is believed.
        strict: whether a leak that only rounding explains was refused, too.
        cast: dtype everything was cast to, None if dtypes are the same.
        matrices: one by one.
        protected: share of all matrices together that the archive forbids to change.
        kept: of the archive's curvature over all matrices; None without moments.
        new_tokens: that were added to its vocabulary; their rows are free, and nothing else of those tensors.
        new_head: tensors of a classifier's head that the base has not; they are free, and so is what its `classes` are called.
        old_text: how they change the way in which text is read that was there before.
        harm: to what the first base says by itself, where that was asked for; `named` what became of protected names.
        notes: what transformers loads as before, and other programs may not.
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
    differences: tuple[str, ...]
    also_trained: tuple[str, ...]
    num_merges: int
    num_claimed: int
    doubt: str | None
    strict: bool
    cast: str | None
    matrices: tuple[MatrixVerification, ...]
    protected: float = 0.0
    kept: float | None = None
    new_tokens: tuple[str, ...] = ()
    new_head: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    old_text: tuple[str, ...] = ()
    harm: Harm | None = None
    named: tuple[NamedHarm, ...] = ()
    notes: tuple[str, ...] = ()


def verify_checkpoints(
    base: Checkpoint,
    tuned: Checkpoint,
    archive: Archive,
    *,
    device: torch.device | None = None,
    strict: bool = False,
    progress: Progress = silent,
    world: World = ALONE,
) -> Verification:
    """Checks a tuned checkpoint against its base and an archive of the base; several processes divide the matrices.

    With `strict` no leak above 1e-3 passes, whatever rounding explains: it could hide one as large.

    Raises:
        VerificationError: if it cannot be carried out: the archive is not of `base` or protects nothing, or tensors do not match.
    """
    try:
        archive.check_base(base, progress)
    except ArchiveError as cause:
        raise VerificationError(str(cause)) from cause
    head, common = find_new_head(base, tuned), None
    if head is None:
        common = in_common_names(base, tuned)
        base, tuned = common.base, common.other
    growth = find_growth(base, tuned)
    check_same_tensors(base, tuned, archive, growth, head)
    measuring = _Measuring(base, tuned, archive, device or torch.device("cpu"), strict, progress, world)
    supposed = trace_lineage(tuned, archive)
    found = measuring.measure(supposed)
    lineage = trace_lineage(tuned, archive, found.digests)
    if world.from_first(lineage != supposed):  # the archive beside it is of other matrices
        first, found = found, measuring.measure(lineage)
        if first.digests != found.digests:
            raise VerificationError(
                f"{tuned.path}: its matrices changed while they were read; verify it when nobody writes there"
            )
    return world.once(lambda: _verdict(base, tuned, archive, lineage, found.matrices, strict, growth, head, common))


class _Measured(NamedTuple):
    """Every matrix as the first process has it, and the digests of what was read of the tuned ones."""

    matrices: list[tuple[LeakMeasure, MatrixVerification]]
    digests: dict[str, str]


@dataclass(frozen=True, eq=False, slots=True)
class _Measuring:
    """Reads each matrix once: what is judged is what the lineage is compared with."""

    base: Checkpoint
    tuned: Checkpoint
    archive: Archive
    device: torch.device
    strict: bool
    progress: Progress
    world: World

    def measure(self, lineage: Lineage) -> _Measured:
        """All matrices, as a lineage explains them."""
        with closing(self.progress(total=len(self.archive), desc="verify", unit="matrix")) as bar:
            found, digests = [], {}
            names = list(self.archive)
            with self.archive.ahead(self.world.share(names)):
                for mark, one in self.world.in_order(names, partial(self._matrix, lineage)):
                    found.append(one)
                    digests[one[1].name] = mark
                    bar.update(1)
        return _Measured(found, self.world.from_first(digests))

    def _matrix(self, lineage: Lineage, name: str) -> Iterator[tuple[str, tuple[LeakMeasure, MatrixVerification]]]:
        record = self.archive[name]
        before, after = self.base.matrix(record), self.tuned.finite_matrix(record)
        dtypes = lineage.dtypes(name, before.dtype, after.dtype)
        measured = measure_leak(before, after, self.archive.read(name), self.device, dtypes)
        declared = lossless(before.dtype, after.dtype) or lineage.declares(name, after.dtype)

        def explained() -> bool:
            return rounds_an_allowed(before, after, self.archive.read(name), self.device, dtypes)

        yield digest(after), (measured, _judge(record, measured, before, self.strict, declared, explained))


def _check_protects(
    tuned: Checkpoint, archive: Archive, measured: Sequence[tuple[LeakMeasure, MatrixVerification]]
) -> None:
    """Refuses an archive that forbids nothing: any matrices would pass."""
    if any(one.violation.num_pairs for one, _ in measured):
        return
    opened = tuned.path / OPENED
    use = opened if (opened / "archive.json").is_file() else "the archive in opened/ beside the output"
    raise VerificationError(
        f"{archive.path}: protects nothing in any of its {len(archive)} matrices, so every change would pass; "
        f"if the task chose its own directions, use {use}"
    )


def _verdict(
    base: Checkpoint,
    tuned: Checkpoint,
    archive: Archive,
    lineage: Lineage,
    measured: Sequence[tuple[LeakMeasure, MatrixVerification]],
    strict: bool,
    growth: Growth | None,
    head: NewHead | None,
    common: Common | None,
) -> Verification:
    """What all matrices, and everything that is none, say together."""
    _check_protects(tuned, archive, measured)
    squares, touched, at_random = [0.0, 0.0, 0.0, 0.0], 0.0, 0.0
    for one, _ in measured:
        found, detail = one.violation, one.detail
        if detail.touched is not None and detail.touched_at_random is not None:
            touched += detail.touched
            at_random += detail.touched_at_random
        for i, value in enumerate((one.update, found.norm, one.rounding, found.rounding)):
            squares[i] += value**2 if one.update else 0.0
    matrices = tuple(judged for _, judged in measured)
    changed, num_untouched = compare_rest(base, tuned, archive, lineage, growth, head)
    found_differences = tuple(differences(base, tuned, growth, None if head is None else head.config))
    if common is not None and (mixed := common.mixed()) is not None:
        found_differences = (f"names of tensors: {mixed}", *found_differences)
    update, frozen, eaten, rounding = (value**0.5 for value in squares)
    scale = update or 1.0
    both = tuned.infos.keys() & base.infos.keys()
    cast = {str(tuned.infos[name].dtype) for name in both if tuned.infos[name].dtype != base.infos[name].dtype}
    return Verification(
        passed=all(matrix.holds for matrix in matrices) and not changed and not found_differences,
        leak=frozen / scale,
        max_leak=max(matrix.leak for matrix in matrices),
        rounding=rounding / scale,
        eaten=min(1.0, eaten / scale),
        num_targets=len(matrices),
        num_changed=sum(matrix.update > 0 for matrix in matrices),
        untouched_identical=not changed,
        num_untouched=num_untouched,
        changed_elsewhere=tuple(changed),
        differences=found_differences,
        also_trained=tuple(sorted(lineage.opened)),
        num_merges=max(1, len(lineage.merges)),
        num_claimed=lineage.claimed,
        doubt=lineage.doubt if lineage.claimed > 1 or lineage.claimed_open else None,
        strict=strict,
        cast=", ".join(sorted(cast)).replace("torch.", "") or None,
        matrices=matrices,
        protected=sum(one.violation.num_pairs for one, _ in measured)
        / sum(prod(each.shape) for each in archive.values()),
        kept=1 - touched / at_random if at_random else None,
        new_tokens=growth.tokens if growth else (),
        new_head=head.fresh if head else (),
        classes=head.classes if head else (),
        notes=(*notes_of(base, tuned, common), *notes_of_calls(base.path, tuned.path)),
    )


def _judge(
    record: MatrixRecord,
    measured: LeakMeasure,
    base: Tensor,
    strict: bool,
    declared: bool,
    explained: Callable[[], bool],
) -> MatrixVerification:
    """Whether a matrix holds; a cast that loses something has to be declared.

    Where a direction stands out, `explained` looks whether rounding made it: it takes its time.
    """
    if measured.update == 0:
        return MatrixVerification(record.name, record.role, 0.0, 0.0, 0.0, 0.0, declared)
    found, detail = measured.violation, measured.detail
    leak, expected = found.norm / measured.update, found.rounding / measured.update
    weight = float(base.to(torch.float64).norm()) or measured.update
    relative = measured.update / weight
    holds = declared and leak <= leak_allowance(expected, found.num_pairs, relative) and leak * relative <= MOST_MOVED
    peak = None
    if detail.peak is not None and detail.peak_rounding is not None:
        allowed = peak_allowance(measured.update, weight, detail.peak_rounding, found.num_pairs)
        peak = detail.peak / allowed
        holds = holds and (peak <= 1 or explained())
    if strict:
        holds &= leak * max(1.0, relative) <= STRICT_LEAK
    return MatrixVerification(
        record.name,
        record.role,
        update=relative,
        leak=leak,
        rounding=expected,
        eaten=min(1.0, measured.rounding / measured.update),
        holds=holds,
        peak=peak,
        kept=1 - detail.touched / detail.touched_at_random
        if detail.touched is not None and detail.touched_at_random
        else None,
    )
