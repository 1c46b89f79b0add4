"""`sculptor.train`: checkpoint, archive and rows in; merged checkpoint, updated archive and report out.

Everything is staged in `<output>.partial`: saved states and metrics while the loop runs, then the complete output
in its folder `output`, which a rename puts in its place.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sculptor.analysis.lineage import OPENED
from sculptor.archive.writer import forget_progress
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.staging import STAGED_NAME, move, partial_path, put_in_place
from sculptor.checkpoint.written import remove
from sculptor.data.rows import Data, as_items, local_files
from sculptor.errors import SettingsError
from sculptor.interruption import signals_wait
from sculptor.methods.kinds import Kinds
from sculptor.methods.settings import is_self
from sculptor.model.load import resolve_device
from sculptor.progress import Progress, silent
from sculptor.tasks.finish import write_output
from sculptor.tasks.first_archive import ANALYZED_NAME, analyze_first
from sculptor.tasks.job import TrainJob, open_base, open_job, read_task
from sculptor.tasks.new_head import HeadedBase, is_begun, wanted_head, with_new_head
from sculptor.tasks.new_tokens import open_grown, write_grown_base
from sculptor.tasks.opening import open_rules
from sculptor.tasks.plan import decide
from sculptor.tasks.precision import load_precision
from sculptor.tasks.processes import check_alike, join, staged_together
from sculptor.tasks.selection import select_rows
from sculptor.tasks.trackers import Tracker, Trackers, check_folder, check_trackers
from sculptor.tasks.train_loop import make_loop
from sculptor.tasks.train_report import TrainReport
from sculptor.training.settings import TrainSettings
from sculptor.training.setup import prepare_model
from sculptor.world import World

_OWN = (ANALYZED_NAME, OPENED)  # archives made on the way, which go along


def train(
    model: str | Path,
    subspaces: str | Path | None,
    data: Data,
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    eval_data: Data = (),
    protect_data: Data = (),
    report_to: Sequence[Tracker] = (),
    replay: Data = (),
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
    rules: Kinds | None = None,
) -> TrainReport:
    """Teaches a checkpoint a task inside what an archive leaves free.

    Args:
        model: the checkpoint directory or hub name.
        subspaces: its subspace archive; without one the model is analyzed first, and the archive stays in the output as
            `analyzed/`.
        data: of the task, one or several: files, folders or hub names (`PLACE[:CONFIG][@SPLIT][:WEIGHT]`), a `Dataset` or
            any iterable of dicts, or pairs of these and a weight.
        output: directory of the merged checkpoint, with the updated archive in `subspaces/`.
        settings: how to train.
        eval_data: likewise, rows whose loss chooses the best parameters of the run.
        protect_data: for that analysis, what the model should stay good at [default: what it says by itself].
        report_to: experiment trackers, through accelerate; what they write as files goes to the folder `runs` beside the output.
        replay: mixed into the task's rows: data as above whose weight is their share of an epoch [default: 0.1 each], or `self`,
            the archive's own samples.
        overwrite: replace an existing output, at success; discard left-overs.
        resume: take up the newest saved state of a run that did not finish.
        progress: makes progress bars.
        notice: told, in a line, what was decided about memory, and what form of data was recognised.
        stop: polled after every step; a signal number saves the state and ends the run.
        rules: kinds of rules beside sculptor's own.

    Returns:
        Figures of the run and of every matrix.

    Raises:
        SculptorError: if an input or the output cannot be used, or the run cannot go on.
    """
    settings = settings or TrainSettings()
    run = functools.partial(
        _train, data=data, output=output, settings=settings, eval_data=eval_data, report_to=report_to, replay=replay,
        overwrite=overwrite, progress=progress, notice=notice, stop=stop, rules=rules,
    )  # fmt: skip
    head = wanted_head(model, data, settings, replay, notice)
    if head is None:
        return run(model, subspaces, protect_data=protect_data, resume=resume)
    given = (*local_files(data), *local_files(eval_data), *local_files(protect_data))
    with with_new_head(
        head, model, subspaces, protect_data, Path(output).resolve(), settings, given, overwrite=overwrite, resume=resume,
        progress=progress, notice=notice, rules=rules,
    ) as made:  # fmt: skip
        return run(made.path, made.archive, protect_data=(), resume=True, made=made)


def _train(
    model: str | Path,
    subspaces: str | Path | None,
    *,
    data: Data,
    output: str | Path,
    settings: TrainSettings,
    eval_data: Data,
    protect_data: Data,
    report_to: Sequence[Tracker],
    replay: Data,
    overwrite: bool,
    resume: bool,
    progress: Progress,
    notice: Callable[[str], object],
    stop: Callable[[], int | None],
    rules: Kinds | None,
    made: HeadedBase | None = None,
) -> TrainReport:
    """`train` of a model that has its head; `made` if that was made for it."""
    check_trackers(report_to)
    _check_used(settings, subspaces, eval_data, protect_data)
    output, world = Path(output).resolve(), join(settings.device)
    device = resolve_device(settings.device)
    staged = functools.partial(
        staged_together, world, output, command="train", overwrite=overwrite, worth_keeping=is_begun
    )
    read = _files(settings, data, eval_data, replay, protect_data)
    rows, archive, given = None, subspaces, subspaces if made is None else made.given_archive
    if archive is None:
        with world.together():
            checkpoint, architecture = open_base(model, settings.attn_implementation)
            rows = read_task(checkpoint, architecture, data, eval_data, settings, notice, replay)
        with staged(inputs=[checkpoint.path, *read], resume=resume) as partial:
            analyze_first(model, partial, protect_data, settings, progress, notice, rules)
        archive, resume = partial_path(output) / ANALYZED_NAME, True
    with world.together():
        new_head = None if made is None else (made.base, made.head.fresh)
        job = open_job(model, archive, data, eval_data, settings, rules, progress, notice, rows, replay, new_head)
    key = {"rows": job.rows_digest, "model": job.archive.manifest.base_identity, "settings": asdict(settings)}
    check_alike(world, key)
    job = decide(job, device, output, world, notice)
    read += [job.base.path, *([] if given is None else [given])]
    if report_to:
        with world.together():
            check_folder(output, read)
    with staged(inputs=read, resume=resume) as partial:
        job = open_rules(_grown(job, partial, progress, world), device, partial, progress, world)
        report = _run(job, device, output, partial, report_to, stop, progress, notice, world)
        world.once(lambda: _place(partial, output, overwrite))
    return report


def _check_used(settings: TrainSettings, subspaces: object, eval_data: Data, protect_data: Data) -> None:
    """Refuses what would have no effect."""
    if settings.eval_every is not None and not as_items(eval_data):
        raise SettingsError("--eval-every without effect: there is no --eval-data")
    if subspaces is not None and as_items(protect_data):
        raise SettingsError("--protect-data without effect: --subspaces says what is protected")


def _files(settings: TrainSettings, data: Data, eval_data: Data, replay: Data, protect_data: Data) -> list[str | Path]:
    """What is read beside checkpoint and archive."""
    replayed = [item for item in as_items(replay) if not (isinstance(item, str) and is_self(item))]
    rows: Iterable[Data] = (data, eval_data, replayed, protect_data)
    return [*(file for part in rows for file in local_files(part)), *filter(None, [settings.chat_template])]


def _grown(job: TrainJob, partial: Path, progress: Progress, world: World) -> TrainJob:
    """The job on a base that has rows for the new tokens."""
    growth = job.growth
    if growth is None:
        return job
    world.once(lambda: write_grown_base(job.checkpoint, growth, partial, progress))
    with world.together():
        grown = open_grown(job.checkpoint, growth, partial)
        return replace(job, checkpoint=grown, architecture=inspect_architecture(grown), ungrown=job.checkpoint)


def _place(partial: Path, output: Path, overwrite: bool) -> None:
    for name in _OWN:
        if (partial / name).is_dir():
            forget_progress(partial / name)  # which one that was killed at its very end has left
            move(partial / name, partial / STAGED_NAME / name)
    put_in_place(partial, output, overwrite=overwrite)


def _run(
    job: TrainJob,
    device: torch.device,
    output: Path,
    partial: Path,
    report_to: Sequence[Tracker],
    stop: Callable[[], int | None],
    progress: Progress,
    notice: Callable[[str], object],
    world: World,
) -> TrainReport:
    """Loads the model, trains it, and writes what comes out."""
    scratch = partial / "scratch"
    loaded, updates = prepare_model(
        job.checkpoint, job.architecture, job.archive, job.settings, list(job.extra), device, scratch, progress, job.growth
    )  # fmt: skip
    trackers = None
    try:
        if job.settings.select_rows is not None:
            job = select_rows(job, loaded, progress, notice, world)
        if job.settings.optimizer == "bayes-adam":
            load_precision(job.archive, updates)
        trackers = Trackers(report_to, output, asdict(job.settings), device) if report_to else None
        told = (lambda _: None) if trackers is None else trackers.log
        with signals_wait():  # the loop asks after every step, and saves its state first
            result = make_loop(job, loaded, updates, partial, stop, told, progress, world).run(progress)
        return write_output(job, loaded, updates, result, output, partial, progress, world)
    finally:
        updates.close()
        if trackers is not None:
            trackers.close()
        remove(scratch)
