"""A new head for a training: the classes of its rows, and a base that has a head for them.

The base with its head is staged beside the output, and what protects its body is an archive of the model as it was given. Only
where that model has no head at all, as an encoder by itself, is the archive made of what the layers of the new base read.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sculptor.archive.places import ANALYZED
from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.heads import NewHead, plan_head, write_with_head
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.checkpoint.staging import partial_path, writing
from sculptor.checkpoint.written import discard, remove
from sculptor.data.labelled import Classes, class_names, listed_classes
from sculptor.data.rows import Data, as_items, read_sources
from sculptor.jobs.classification import check_task
from sculptor.jobs.job import open_base
from sculptor.jobs.processes import Place, join
from sculptor.jobs.train_request import TrainRequest
from sculptor.model.load import load_tokenizer
from sculptor.progress import Progress
from sculptor.tasks.first_archive import analyze_first, has_archive
from sculptor.training.settings import CLASSIFICATION, TrainSettings
from sculptor.training.state import has_state
from sculptor.world import World

HEADED_NAME = "headed"


@dataclass(frozen=True, eq=False, slots=True)
class HeadedBase:
    """A base that has got a head.

    Attributes:
        path: of it, while the training runs.
        archive: that protects its body; `given_archive` if it was given.
        base: the checkpoint as it was given.
        head: what is new.
    """

    path: Path
    archive: str | Path
    given_archive: str | Path | None
    base: Checkpoint
    head: NewHead


def is_begun(partial: Path) -> bool:
    """Whether something was made that a later run can use."""
    return has_state(partial) or has_archive(partial)


def wanted_head(request: TrainRequest) -> NewHead | None:
    """The head that a training asks for and its model has not; None if there is nothing to make.

    Raises:
        SculptorError: if the model cannot get it, or the rows do not tell their classes.
    """
    settings, data = request.settings, request.data
    if settings.task != CLASSIFICATION:
        return None
    with join(settings.device).together():
        checkpoint, architecture = open_base(request.model, settings.attn_implementation, headed=False)
        if architecture.kind == "classifier":
            return None
        _check(architecture, settings, request.replay)
        if not as_items(data):
            return None  # which is refused later
        sources = read_sources(data, settings.max_rows, settings.columns, classes=Classes())
        classes = class_names(row for source in sources for row in source.rows)
        tokenizer = load_tokenizer(checkpoint, architecture)
        pad_id = next((i for i in _paddings(tokenizer, checkpoint) if i is not None), None)
        head = plan_head(checkpoint, classes, pad_id)
    request.notice(f"a new head, {', '.join(head.fresh)}, for {len(classes)} classes: {listed_classes(classes)}")
    return head


def _paddings(tokenizer: object, checkpoint: Checkpoint) -> Sequence[int | None]:
    """What may pad: the tokenizer's own padding first, since that is what others will pad with."""
    own, end = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    said = checkpoint.config.get("pad_token_id")
    return own, said if isinstance(said, int) else None, end


def _check(architecture: Architecture, settings: TrainSettings, replay: Data) -> None:
    """Refuses what a classifier cannot be told, before it is made."""
    check_task(replace(architecture, kind="classifier"), settings, replay)


@contextmanager
def with_new_head(head: NewHead, request: TrainRequest) -> Iterator[HeadedBase]:
    """Stages a base with a new head, and its archive if none is given; after an error both go, unless `--resume` can use them.

    Raises:
        SculptorError: if they cannot be made.
    """
    settings, subspaces = request.settings, request.subspaces
    world, partial = join(settings.device), partial_path(request.output)
    request.check_protected()
    checkpoint = open_checkpoint(request.model, settings.attn_implementation)
    path = partial / HEADED_NAME / checkpoint.path.resolve().name
    place = Place(world, request.output, "train", request.overwrite, request.resume)
    with place.staged([checkpoint.path, *request.files(), *([] if subspaces is None else [subspaces])], is_begun):
        world.once(lambda: _write(checkpoint, path, head, settings.seed, request.progress))
        if subspaces is None:
            bare = inspect_architecture(checkpoint).kind == "headless"
            analyze_first(
                path if bare else request.model,
                partial,
                request.protect_data,
                settings,
                request.progress,
                request.notice,
                request.rules,
                "inputs" if bare else None,
            )
    try:
        yield HeadedBase(path, subspaces or partial / ANALYZED, subspaces, checkpoint, head)
    except BaseException:
        _discard(world, partial)
        raise


def _discard(world: World, partial: Path) -> None:
    """Removes what only a finished training has a use for."""
    if world.first and partial.is_dir() and not is_begun(partial):
        discard(partial)


def _write(checkpoint: Checkpoint, path: Path, head: NewHead, seed: int, progress: Progress) -> None:
    with writing(path):
        remove(path.parent)
        path.mkdir(parents=True)
    with closing(progress(total=checkpoint.num_bytes, desc="new head", unit="B")) as bar:
        write_with_head(checkpoint, path, head, seed, bar)
