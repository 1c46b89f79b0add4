"""The archive that `train` makes for itself where none is given: what the model says, or given data, by curvature."""

from collections.abc import Callable
from pathlib import Path

from sculptor.archive.store import MANIFEST_NAME, Archive
from sculptor.archive.writer import has_progress
from sculptor.checkpoint.staging import partial_path
from sculptor.data.rows import Data, as_items, names_of
from sculptor.errors import OutputError, SettingsError
from sculptor.methods.kinds import Kinds
from sculptor.methods.settings import SELF, AnalyzeSettings, Basis
from sculptor.progress import Progress
from sculptor.tasks.analyze import analyze
from sculptor.tasks.job import open_base
from sculptor.training.settings import TrainSettings

ANALYZED_NAME = "analyzed"


def has_archive(staged: Path) -> bool:
    """Whether a staging directory holds such an archive, or a part of one."""
    path = staged / ANALYZED_NAME
    return (path / MANIFEST_NAME).is_file() or has_progress(partial_path(path))


def analyze_first(
    model: str | Path,
    staged: Path,
    data: Data,
    settings: TrainSettings,
    progress: Progress,
    notice: Callable[[str], object],
    rules: Kinds | None,
    basis: Basis | None = None,
) -> None:
    """Writes `analyzed/` into a staging directory, unless it is there.

    Args:
        model: that is going to be trained.
        staged: directory of the training.
        data: to calibrate on; none for what the model says.
        settings: of the training: device, seed and offloading are those of the analysis.
        progress: makes progress bars.
        notice: told what was chosen.
        rules: kinds of rules beside sculptor's own.
        basis: what is protected [default: as `analyze` chooses].

    Raises:
        SculptorError: if the model cannot be analyzed, or what is there was made of other data.
    """
    path, items = staged / ANALYZED_NAME, as_items(data)
    asked = AnalyzeSettings(
        basis=basis, device=settings.device, seed=settings.seed, attn_implementation=settings.attn_implementation
    )
    if not items:
        check_samples(model)
    if not (path / MANIFEST_NAME).is_file():
        analyze(
            model,
            path,
            asked,
            data=items,
            offload=settings.offload,
            resume=True,
            progress=progress,
            notice=lambda text: notice(f"as by `sculptor analyze`: {text}"),
            rules=rules,
        )
        return
    found = Archive(path, rules=rules).manifest.settings
    if (found.data, found.seed) != (names_of(items) or (SELF,), settings.seed):
        raise OutputError(
            f"{path}: was made with other --protect-data or another --seed; pass --overwrite to start anew"
        )


def check_samples(model: str | Path) -> None:
    """Refuses a model that says nothing by itself, in terms of `train`.

    Raises:
        SettingsError: saying what to give.
    """
    checkpoint, architecture = open_base(model)
    if architecture.kind != "causal":
        raise SettingsError(
            f"{checkpoint.path}: only a causal model can sample text to calibrate on; give --protect-data, or an archive as "
            "--subspaces"
        )
