"""The archive that `train` makes for itself where none is given: what the model says, or given data, by curvature."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sculptor.archive.places import ANALYZED
from sculptor.archive.store import MANIFEST_NAME, Archive
from sculptor.archive.writer import has_progress
from sculptor.checkpoint.staging import move_back, partial_path
from sculptor.checkpoint.tokenizers import speech_digest
from sculptor.data.row_types import MessagesRow
from sculptor.data.rows import Data, Item, as_items, digest_rows, names_of, read_sources, weight_of
from sculptor.errors import OutputError, SettingsError
from sculptor.jobs.defaults import FEWER
from sculptor.jobs.job import open_base, read_offload
from sculptor.jobs.made_of import REMEDY, check_made_of
from sculptor.jobs.processes import join
from sculptor.methods.kinds import Kinds
from sculptor.methods.settings import SELF, AnalyzeSettings, Basis, is_self
from sculptor.model.load import load_tokenizer
from sculptor.progress import Progress
from sculptor.tasks.analyze import analyze
from sculptor.training.settings import TrainSettings
from sculptor.validation import file_digest


def has_archive(staged: Path) -> bool:
    """Whether a staging directory holds such an archive, or a part of one."""
    path = staged / ANALYZED
    return (path / MANIFEST_NAME).is_file() or has_progress(partial_path(path))


_FEWER = "analyze by itself first, with fewer --calibration-tokens, and train with --subspaces, if that is too long"


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
    path, items = staged / ANALYZED, as_items(data)
    template = _template_for(model, items, settings)
    asked = AnalyzeSettings(
        basis=basis,
        device=settings.device,
        seed=settings.seed,
        attn_implementation=settings.attn_implementation,
        chat_template=template,
    )
    if not items:
        check_samples(model)
    world = join(settings.device)
    with world.together():
        read = _read_of(items, template) | {"tokenizer": speech_digest(open_base(model)[0].path)}
    world.once(lambda: move_back(staged, ANALYZED))
    world.once(lambda: check_made_of(staged, ANALYZED, read, "was made with another tokenizer or other --protect-data"))
    if not (path / MANIFEST_NAME).is_file():
        analyze(
            model,
            path,
            asked,
            data=items,
            offload=read_offload(settings.offload),
            resume=True,
            progress=progress,
            notice=lambda text: notice(f"as by `sculptor analyze`: {text.replace(FEWER, _FEWER)}"),
            rules=rules,
        )
        return
    found = Archive(path, rules=rules).manifest.settings
    named = template and Path(template).name
    if (found.data, found.seed, found.chat_template) != (names_of(items) or (SELF,), settings.seed, named):
        raise OutputError(f"{path}: was made with other --protect-data, another --seed or --chat-template; {REMEDY}")


def _read_of(items: Sequence[Item], template: str | None) -> dict[str, Any]:
    """What a run that is taken up has to read as it was: names do not tell what is in files."""
    own = [item for item in items if not (isinstance(item, str) and is_self(item))]
    again = [item for item in own if not isinstance(item, Iterator)]  # those can be read once only
    rows = (row for source in read_sources(again, mixed=True) for row in source.rows)
    return {
        "rows": digest_rows(rows),
        "weights": [weight_of(item) for item in own],
        "template": template and file_digest(Path(template)),
    }


def _template_for(model: str | Path, items: Sequence[Item], settings: TrainSettings) -> str | None:
    """The training's chat template, if any of the data are conversations, or the model has one to talk through."""
    if settings.chat_template is None:
        return None
    own = [item for item in items if not (isinstance(item, str) and is_self(item))]
    if not own:
        return settings.chat_template if load_tokenizer(*open_base(model)).chat_template else None
    rows = (row for source in read_sources(own, mixed=True) for row in source.rows)
    return settings.chat_template if any(isinstance(row, MessagesRow) for row in rows) else None


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
