"""Which archive somebody may have meant: an output has up to two."""

from pathlib import Path

MANIFEST_NAME = "archive.json"
CARRIED = "subspaces"  # where an output has the archive for the next task
OPENED = "opened"  # and the one that it was trained with, if its rules were chosen by the task's rows
ANALYZED = "analyzed"  # and the one that `train` made first, if none was given


def hint(path: Path) -> str:
    """Which archives are in a folder that is none; empty if there are none."""
    told = {ANALYZED: "that of the model that was trained", CARRIED: "the one for the task after this"}
    parts = [f"{told[name]} is {path / name}" for name in told if (path / name / MANIFEST_NAME).is_file()]
    return f"; {', '.join(parts)}" if parts else ""


def remedy(archive: Path, model: Path | None) -> str:
    """What to do about an archive that is not a model's; None for a model that was loaded from nowhere."""
    path = archive.resolve()
    owner = path.parent
    if (owner / "config.json").is_file() and (model is None or owner != model.resolve()):
        if path.name == ANALYZED:
            return f"it is the archive of what {owner} was trained from"
        made = owner / ANALYZED
        use = str(made) if (made / MANIFEST_NAME).is_file() else "the archive that was trained with"
        return f"it belongs to {owner}, for the task after; use {use}"
    carried = None if model is None else model / CARRIED
    return f"use {carried}" if carried is not None and carried.is_dir() else "run `sculptor analyze` on this checkpoint"
