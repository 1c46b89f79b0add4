"""`sculptor.verify`: proof from files that the protected part of a checkpoint did not move."""

from pathlib import Path

from sculptor.analysis.verify import Verification, verify_checkpoints
from sculptor.archive.store import Archive
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.methods.kinds import Kinds
from sculptor.model.load import resolve_device
from sculptor.progress import Progress, silent
from sculptor.tasks.processes import join


def verify(
    base: str | Path,
    tuned: str | Path,
    subspaces: str | Path,
    *,
    device: str = "auto",
    strict: bool = False,
    progress: Progress = silent,
    rules: Kinds | None = None,
) -> Verification:
    """Checks a tuned checkpoint against its base and an archive of that base.

    Args:
        base: the checkpoint the archive was made for.
        tuned: what training made of it, after one task or several.
        subspaces: the archive.
        device: where the float64 products run.
        strict: refuse a leak above 1e-3 that only the rounding of what is stored explains: it could hide one as large.
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
    return verify_checkpoints(
        *checkpoints, archive, device=resolve_device(device), strict=strict, progress=progress, world=world
    )
