"""`sculptor.train`: checkpoint, archive and rows in; merged checkpoint, updated archive and report out.

Everything is staged in `<output>.partial`: saved states and metrics while the loop runs, then the complete output
in its folder `output`, which a rename puts in its place.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sculptor.analysis.lineage import OPENED
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.staging import commit, partial_path, writing
from sculptor.checkpoint.written import discard, remove
from sculptor.data.examples import digest_examples
from sculptor.data.rows import Data, as_items, local_files
from sculptor.errors import SettingsError
from sculptor.evaluation.loss import mean_loss
from sculptor.interruption import signals_wait
from sculptor.methods.kinds import Kinds
from sculptor.methods.settings import is_self
from sculptor.model.load import LoadedModel, resolve_device
from sculptor.model.samples import SECTION
from sculptor.planning.placement import choose
from sculptor.progress import Progress, silent
from sculptor.tasks.finish import write_output
from sculptor.tasks.first_archive import ANALYZED_NAME, analyze_first, has_archive
from sculptor.tasks.job import TrainJob, open_base, open_job, read_task
from sculptor.tasks.new_tokens import open_grown, write_grown_base
from sculptor.tasks.opening import open_rules
from sculptor.tasks.plan import choose_parallel, plans_of, split_steps
from sculptor.tasks.processes import check_alike, join, on_this_machine, staged_together
from sculptor.tasks.trackers import Tracker, Trackers, check_folder, check_trackers
from sculptor.tasks.train_report import TrainReport
from sculptor.training.base import BaseWeights
from sculptor.training.harm import HarmControl
from sculptor.training.loop import TrainingLoop, make_accelerator
from sculptor.training.settings import Offload, TrainSettings
from sculptor.training.setup import prepare_model
from sculptor.training.state import STATE_NAME, StateStore, has_state
from sculptor.training.stepping.updates import Updates
from sculptor.world import World, here

# Settings that decide how a run is done, not what comes out.
_SPLIT = ("micro_batch_size",)
_HOW = (
    "common_tokens",
    "save_every",
    "offload",
    "parallel",
    "offload_inputs",
    "optimizer_on",
    "optimizer_mode",
    "checkpoint_activations",
)
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
    check_trackers(report_to)
    output = Path(output).resolve()
    world = join(settings.device)
    device = resolve_device(settings.device)
    if settings.eval_every is not None and not as_items(eval_data):
        raise SettingsError("--eval-every without effect: there is no --eval-data")
    replayed = [item for item in as_items(replay) if not (isinstance(item, str) and is_self(item))]
    read: list[str | Path] = [*local_files(data), *local_files(eval_data), *local_files(replayed)]
    read += filter(None, [settings.chat_template])
    staged = functools.partial(
        staged_together, world, output, command="train", overwrite=overwrite, worth_keeping=_is_begun
    )
    rows, given = None, subspaces
    if subspaces is None:
        with world.together():
            checkpoint, architecture = open_base(model, settings.attn_implementation)
            rows = read_task(checkpoint, architecture, data, eval_data, settings, notice, replay)
        read += local_files(protect_data)
        with staged(inputs=[checkpoint.path, *read], resume=resume) as partial:
            analyze_first(model, partial, protect_data, settings, progress, notice, rules)
        subspaces, resume = partial_path(output) / ANALYZED_NAME, True
    elif as_items(protect_data):
        raise SettingsError("--protect-data without effect: --subspaces says what is protected")
    with world.together():
        job = open_job(model, subspaces, data, eval_data, settings, rules, progress, notice, rows, replay)
    check_alike(
        world, {"rows": job.rows_digest, "model": job.archive.manifest.base_identity, "settings": asdict(settings)}
    )
    asked, wanted = job.settings.checkpoint_activations, job.settings.parallel
    with world.together():
        job = choose_parallel(job, device, world)
    divided = job.settings.parallel == "shard"
    job = split_steps(job, device, world)
    with world.together():
        found = choose(
            plans_of(job, device, world),
            device,
            job.settings.offload,
            output,
            partial_path(output),
            sharing=on_this_machine() if divided else 1,
        )
    plan, reason = world.from_first(found)
    resident = plan.offload == "none" and not divided
    _check_resident(job.settings, resident)
    settings = job.settings if resident else replace(job.settings, checkpoint_activations=asked)
    placed, unused = _placed(settings, plan.offload, divided)
    if unused:
        reason += f"; without effect there: {', '.join(unused)}"
    quiet = reason.endswith(("as asked", "everything fits")) and (settings.parallel == wanted or not divided)
    if world.size > 1:
        reason += f"; --parallel {settings.parallel}"
    if not quiet:
        notice(reason)
    job = replace(job, settings=placed, placement=reason)
    read += [job.checkpoint.path, *([] if given is None else [given])]
    if report_to:
        with world.together():
            check_folder(output, read)
    with staged(inputs=read, resume=resume) as partial:
        scratch = partial / "scratch"
        job = _grown(job, partial, progress, world)
        job = open_rules(job, device, partial, progress, world)
        loaded, updates = prepare_model(
            job.checkpoint, job.architecture, job.archive, job.settings, list(job.extra), device, scratch, progress,
            job.growth,
        )  # fmt: skip
        trackers = None
        try:
            trackers = Trackers(report_to, output, asdict(job.settings), device) if report_to else None
            trained = job.trained
            loop = TrainingLoop(
                loaded,
                updates,
                trained.examples,
                job.settings,
                store=StateStore(
                    partial / STATE_NAME, _run_key(job, loaded, progress), updates.fingerprints(), _split(job, world)
                ),
                metrics=partial / "metrics.jsonl",
                evaluate=_evaluator(loaded, job),
                harm=_harm_control(loaded, updates, job, world),
                as_base=None if job.settings.kl_weight is None else BaseWeights(loaded.model, updates.extra),
                stop=stop,
                world=world,
                mixture=trained.mixture,
                report=(lambda _: None) if trackers is None else trackers.log,
            )
            with signals_wait():  # the loop asks after every step, and saves its state first
                result = loop.run(progress)
            del loop
            report = write_output(job, loaded, updates, result, output, partial, progress, world)
        finally:
            updates.close()
            if trackers is not None:
                trackers.close()
            remove(scratch)
        world.once(lambda: _place(partial, output, overwrite))
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


def _is_begun(partial: Path) -> bool:
    """Whether something was made that a later run can use."""
    return has_state(partial) or has_archive(partial)


def _place(partial: Path, output: Path, overwrite: bool) -> None:
    for name in _OWN:
        if (partial / name).is_dir():
            with writing(partial / "output" / name):
                (partial / name).replace(partial / "output" / name)
    commit(partial / "output", output, overwrite=overwrite)
    discard(partial)


def _check_resident(settings: TrainSettings, resident: bool) -> None:
    """Refuses what needs all of the model on the device."""
    if settings.kl_weight is not None and not resident:
        raise SettingsError(
            "--kl-weight: the base's forward needs all of the model on one device; leave it out, or use --offload none and "
            "--parallel replicate (--max-harm goes with offloading)"
        )


def _placed(settings: TrainSettings, offload: Offload, divided: bool) -> tuple[TrainSettings, list[str]]:
    """The settings for where `auto` put the model, and the options that have no effect there."""
    waits, resident = offload != "none", offload == "none" and not divided
    # By name: whether it matters there, the option, and the values that ask for what is done anyway, default first.
    concerns: dict[str, tuple[bool, str, tuple[Any, Any]]] = {
        "optimizer_on": (offload == "cpu", "--optimizer-on", ("auto", "device")),
        "optimizer_mode": (waits, "--optimizer-mode fused", ("exact", "exact")),
        "offload_inputs": (waits, "--offload-inputs", (None, False)),
        "checkpoint_activations": (resident, "--keep-activations", (None, True)),
    }
    idle = {name: (option, same) for name, (matters, option, same) in concerns.items() if not matters}
    unused = [option for name, (option, same) in idle.items() if getattr(settings, name) not in same]
    return replace(settings, offload=offload, **{name: same[0] for name, (_, same) in idle.items()}), unused


def _evaluator(loaded: LoadedModel, job: TrainJob) -> Callable[[], float] | None:
    if job.evaluation is None:
        return None
    examples, size = job.evaluation.examples, job.settings.micro_rows
    accelerator = make_accelerator(loaded.device)

    def evaluate() -> float:
        with accelerator.autocast():
            return mean_loss(loaded, examples, size, world=here())[0]

    return evaluate


def _harm_control(loaded: LoadedModel, updates: Updates, job: TrainJob, world: World) -> HarmControl | None:
    if job.samples is None:
        return None
    settings, autocast = job.settings, make_accelerator(loaded.device).autocast
    assert settings.harm_every is not None
    return HarmControl(loaded, updates, job.samples, settings.harm_every, settings.max_harm, autocast, world)


def _run_key(job: TrainJob, loaded: LoadedModel, progress: Progress) -> dict[str, Any]:
    """What has to be the same for a saved state to be taken up."""
    settings = asdict(job.settings)
    for name in (*_HOW, *_SPLIT):
        settings.pop(name)
    trained = job.trained
    examples = [trained.examples, job.evaluation.examples if job.evaluation else ()]
    if job.architecture.kind == "masked":
        settings["mask"] = [loaded.tokenizer.mask_token_id, loaded.pad_id, len(loaded.tokenizer)]
    settings["mixture"] = None if trained.mixture is None else asdict(trained.mixture)
    settings["eval_data"] = None if job.evaluation is None else f"{len(job.evaluation.examples)} rows"
    samples = job.archive.manifest.sections.get(SECTION)
    return settings | {
        "base": job.archive.manifest.base_identity,
        "subspaces": job.archive.identity,
        "samples": None if samples is None else samples.sha256,
        "model": job.checkpoint.digests_beside({record.tensor for record in job.archive.values()}, progress),
        "rows": job.rows_digest,
        "tokens": [digest_examples(part) for part in examples],
    }


def _split(job: TrainJob, world: World) -> dict[str, int]:
    """How a step is split: decides rounding, and differs with the number of processes."""
    given = {name: getattr(job.settings, name) for name in _SPLIT}
    return {"processes": world.size, "threads": torch.get_num_threads(), **given}
