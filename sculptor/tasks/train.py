"""`sculptor.train`: checkpoint, archive and rows in; merged checkpoint, updated archive and report out.

Everything is staged in `<output>.partial`: saved states and metrics while the loop runs, then the complete output
in its folder `output`, which a rename puts in its place.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sculptor.archive.places import ANALYZED, CARRIED, OPENED
from sculptor.archive.store import MANIFEST_NAME
from sculptor.archive.writer import forget_progress
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.directory import tell_left_behind
from sculptor.checkpoint.staging import STAGED_NAME, move, partial_path, put_in_place
from sculptor.checkpoint.written import LOCK_NAME, remove
from sculptor.data.rows import Data, to_read_again
from sculptor.interruption import signals_wait
from sculptor.jobs.expected import tell_expected
from sculptor.jobs.finish import write_output
from sculptor.jobs.job import TrainJob, open_base, open_job, read_task
from sculptor.jobs.memory import fit_memory
from sculptor.jobs.new_tokens import open_grown, write_grown_base
from sculptor.jobs.opening import open_rules
from sculptor.jobs.own_rows import draw_own_rows
from sculptor.jobs.plan import plan_job
from sculptor.jobs.precision import load_precision
from sculptor.jobs.processes import Place, check_alike, join
from sculptor.jobs.replay import steps_of
from sculptor.jobs.selection import select_rows
from sculptor.jobs.trackers import Tracker, Trackers, check_folder, check_trackers
from sculptor.jobs.train_loop import check_taken_up, make_loop
from sculptor.jobs.train_report import TrainReport
from sculptor.jobs.train_request import TrainRequest
from sculptor.methods.kinds import Kinds
from sculptor.model.load import resolve_device
from sculptor.model.probe import tell_own_terms
from sculptor.progress import Progress, silent
from sculptor.tasks.first_archive import analyze_first, check_samples
from sculptor.tasks.new_head import HeadedBase, is_begun, wanted_head, with_new_head
from sculptor.training.precision import autocast
from sculptor.training.settings import TrainSettings
from sculptor.training.setup import prepare_model
from sculptor.world import World

_OWN = (ANALYZED, OPENED)  # archives made on the way, which go along


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
            what the model says before the first step.
        overwrite: replace an existing output, at success; discard left-overs.
        resume: take up the newest saved state of a run that did not finish.
        progress: makes progress bars.
        notice: told, in a line, what was decided about memory, and what form of data was recognised, and what
            looks like weights and does not go along.
        stop: polled after every step; a signal number saves the state and ends the run.
        rules: kinds of rules beside sculptor's own.

    Returns:
        Figures of the run and of every matrix.

    Raises:
        SculptorError: if an input or the output cannot be used, or the run cannot go on.
    """
    settings = settings or TrainSettings()
    request = TrainRequest(
        model=model, subspaces=subspaces, data=to_read_again(data, settings.max_rows), output=Path(output).resolve(),
        settings=settings, eval_data=to_read_again(eval_data), protect_data=protect_data, report_to=report_to,
        replay=to_read_again(replay, settings.max_rows), overwrite=overwrite,
        resume=resume, progress=progress, notice=notice, stop=stop, rules=rules,
    )  # fmt: skip
    check_trackers(request.report_to)
    request.check_used()
    given = [] if subspaces is None else [subspaces]
    _place_of(request).check([model, *given, *request.files()])
    head = wanted_head(request)
    if head is None:
        return _train(request)
    with with_new_head(head, request) as made:
        headed = replace(request, model=made.path, subspaces=made.archive, protect_data=(), resume=True)
        return _train(headed, made)


def _place_of(request: TrainRequest) -> Place:
    return Place(join(request.settings.device), request.output, "train", request.overwrite, request.resume)


def _tell_own_archive(place: Path, notice: Callable[[str], object]) -> None:
    """Says that the model has an archive, which a user who gives none may have forgotten."""
    if (place / MANIFEST_NAME).is_file():
        notice(
            f"{place} protects what earlier tasks of this model use, and is left aside: --subspaces {place} trains with it"
        )


def _train(request: TrainRequest, made: HeadedBase | None = None) -> TrainReport:
    """`train` of a model that has its head; `made` if that was made for it."""
    settings, output, progress, notice = request.settings, request.output, request.progress, request.notice
    place, device = _place_of(request), resolve_device(settings.device)
    world = place.world
    read, given = request.files(), request.subspaces if made is None else made.given_archive
    rows = None
    if request.subspaces is None:
        with world.together():
            checkpoint, architecture = open_base(request.model, settings.attn_implementation)
            rows = read_task(
                checkpoint, architecture, request.data, request.eval_data, settings, notice, request.replay
            )
        if not request.protect_data:
            check_samples(request.model)
        _tell_own_archive(checkpoint.path / CARRIED, notice)
        steps = steps_of(rows.encoded, rows.replays, settings)
        steps.tell(settings, notice)  # before a long analysis
        if not request.resume:
            tell_expected(checkpoint, architecture, None, steps, rows.encoded.examples, settings, notice)
        with place.staged([checkpoint.path, *read], is_begun) as partial:
            analyze_first(request.model, partial, request.protect_data, settings, progress, notice, request.rules)
        request = replace(request, subspaces=partial_path(output) / ANALYZED, resume=True)
        place = replace(place, resume=True)
    with world.together():
        job = open_job(request, rows, None if made is None else (made.base, made.head.fresh))
    tell_left_behind(job.base.path, job.base.files, notice)
    key = {"rows": job.rows_digest, "model": job.archive.manifest.base_identity, "settings": asdict(settings)}
    check_alike(world, key)
    job = plan_job(job, device, output, world, notice)
    read += [job.base.path, *([] if given is None else [given])]
    if request.report_to:
        with world.together():
            check_folder(output, read)
    with place.staged(read, is_begun) as partial:
        if rows is None and job.steps is not None:
            job.steps.tell(settings, notice)
        job = fit_memory(job, settings.memory_rows, partial, device, notice, world)
        if rows is None and job.steps is not None and not request.resume:
            examples = job.encoded.examples
            tell_expected(job.checkpoint, job.architecture, job.archive, job.steps, examples, job.settings, notice)
        job = open_rules(_grown(job, partial, progress, world), device, partial, progress, world)
        job = draw_own_rows(job, device, partial, progress, notice, world)
        world.once(functools.partial(check_taken_up, job, partial))
        report = _run(request, job, device, partial, world)
        world.once(lambda: _place(partial, output, request.overwrite))
    return report


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
            forget_progress(partial / name)  # which one that was killed at its very end has left, as its lock
            (partial / name / LOCK_NAME).unlink(missing_ok=True)
            move(partial / name, partial / STAGED_NAME / name)
    put_in_place(partial, output, overwrite=overwrite)


def _run(request: TrainRequest, job: TrainJob, device: torch.device, partial: Path, world: World) -> TrainReport:
    """Loads the model, trains it, and writes what comes out."""
    scratch, progress = partial / "scratch", request.progress
    loaded, updates = prepare_model(
        job.checkpoint, job.architecture, job.archive, job.settings, list(job.extra), device, scratch, progress, job.growth
    )  # fmt: skip
    trackers = None
    try:
        with autocast(job.settings.precision, loaded.device):
            tell_own_terms(job.architecture, loaded.model, loaded.device, request.notice)
        if job.settings.select_rows is not None:
            job = select_rows(job, loaded, progress, request.notice, world)
        if job.settings.optimizer == "bayes-adam":
            load_precision(job.archive, updates)
        if request.report_to:
            trackers = Trackers(request.report_to, request.output, asdict(job.settings), device)
        told = (lambda _: None) if trackers is None else trackers.log
        with signals_wait():  # the loop asks after every step, and saves its state first
            result = make_loop(job, loaded, updates, partial, request.stop, told, progress, world).run(progress)
        return write_output(job, loaded, updates, result, request.output, partial, progress, world)
    finally:
        updates.close()
        if trackers is not None:
            trackers.close()
        remove(scratch)
