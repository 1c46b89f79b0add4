"""`sculptor.verify`: proof from files that the protected part of a checkpoint did not move."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from sculptor.analysis.verify import Verification, verify_checkpoints
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.old_text import measure_reread
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.checkpoint.vocabulary import find_growth
from sculptor.jobs.harm import need_samples
from sculptor.jobs.job import open_model
from sculptor.jobs.new_tokens import texts_of
from sculptor.jobs.processes import join
from sculptor.methods.kinds import Kinds
from sculptor.model.harm import measure_harm
from sculptor.model.load import resolve_device
from sculptor.model.protected import measure_protected, read_protected
from sculptor.model.samples import read_samples
from sculptor.progress import Progress, silent


def verify(
    base: str | Path,
    tuned: str | Path,
    subspaces: str | Path,
    *,
    device: str = "auto",
    strict: bool = False,
    harm: bool = False,
    progress: Progress = silent,
    rules: Kinds | None = None,
) -> Verification:
    """Checks a tuned checkpoint against its base and an archive of that base.

    Args:
        base: the checkpoint the archive was made for.
        tuned: what training made of it, after one task or several.
        subspaces: the archive.
        device: where the float64 products run.
        strict: refuse a leak above 1e-3 that only the rounding of what is stored explains: it could hide one as large. And new
            tokens that stand in old text.
        harm: run `tuned`, too, and measure KL(base || tuned) on the archive's samples; it decides nothing.
        progress: makes progress bars.
        rules: kinds of rules beside sculptor's own.

    Returns:
        The leak of every matrix and of all, and whether everything else is untouched.

    Raises:
        VerificationError: if it cannot be carried out.
        SculptorError: if an input cannot be read.
    """
    world = join(device)
    with world.together():
        checkpoints = open_checkpoint(base), open_checkpoint(tuned)
        archive = Archive(subspaces, rules=rules)
        architecture = inspect_architecture(checkpoints[1]) if harm else None
        samples = None if architecture is None else need_samples(archive, architecture.vocab_size).reporting
        kept = () if architecture is None else read_protected(archive, architecture.vocab_size)
    found = verify_checkpoints(
        *checkpoints, archive, device=resolve_device(device), strict=strict, progress=progress, world=world
    )
    if found.new_tokens:
        found = _with_old_text(found, *checkpoints, archive)
    if architecture is None or samples is None:
        return found
    loaded = open_model(checkpoints[1], resolve_device(device), architecture, "auto", progress=progress)
    with closing(loaded):
        measured = measure_harm(loaded.model, samples, loaded.device, pad_id=loaded.pad_id, world=world)
        named = [measure_protected(loaded.model, each, loaded.device, pad_id=loaded.pad_id) for each in kept]
    return replace(found, harm=measured, named=tuple(named))


_UNKNOWN = "whether they stand in text cannot be told: the archive keeps no samples of what the base says by itself"


def _with_old_text(found: Verification, base: Checkpoint, tuned: Checkpoint, archive: Archive) -> Verification:
    """Says how old text is read otherwise by new tokens; strictly, it may not be."""
    growth, samples = find_growth(base, tuned), read_samples(archive)
    assert growth is not None
    reread = measure_reread(base.path, growth, () if samples is None else texts_of(samples))
    unknown = "" if samples is not None else _UNKNOWN
    lines = (*reread.lines, *filter(None, [reread.summary, unknown]))
    if not (found.strict and lines):
        return replace(found, old_text=lines)
    differ = tuple(f"new tokens: {line}" for line in lines)
    return replace(found, old_text=lines, differences=(*found.differences, *differ), passed=False)
