"""`sculptor.train`: checkpoint, archive and rows in; merged checkpoint, updated archive and report out.

Everything is staged in `<output>.partial`: saved states and metrics while the loop runs, then the complete output
in its folder `output`, which a rename puts in its place.
"""

import fnmatch
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.reader import identity, open_checkpoint
from sculptor.checkpoint.staging import check_apart, commit, partial_path, staging
from sculptor.data.examples import digest_examples, encode, resolve_max_length
from sculptor.data.rows import read_rows
from sculptor.errors import CapacityError, DataError, SettingsError
from sculptor.evaluation.loss import mean_loss
from sculptor.model.load import LoadedModel, check_head, load_tokenizer, resolve_device
from sculptor.progress import Progress, silent
from sculptor.tasks.placement import archive_shapes, choose, output_bytes
from sculptor.tasks.train_output import TrainJob, cast_to, write_output
from sculptor.tasks.train_report import TrainReport
from sculptor.tasks.train_setup import prepare
from sculptor.training.footprint import Footprint, Workload, footprints
from sculptor.training.loop import TrainingLoop, make_accelerator
from sculptor.training.settings import DEFAULT_RATE, Carry, Offload, TrainSettings
from sculptor.training.state import STATE_NAME, StateStore, has_state
from sculptor.training.streamed_update import optimizer_on_host

MEMORY_ROWS = 384
# Settings that decide how a run is done, not what comes out.
_HOW = ("save_every", "offload", "offload_inputs", "optimizer_on", "optimizer_mode", "checkpoint_activations")


def train(
    model: str | Path,
    subspaces: str | Path,
    data: Sequence[str | Path],
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    eval_data: Sequence[str | Path] = (),
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
) -> TrainReport:
    """Teaches a checkpoint a task inside what an archive leaves free.

    Args:
        model: the checkpoint directory or hub name.
        subspaces: its subspace archive.
        data: JSONL or text files of the task.
        output: directory of the merged checkpoint, with the updated archive in `subspaces/`.
        settings: how to train.
        eval_data: files whose loss chooses the best parameters of the run.
        overwrite: replace an existing output, at success; discard left-overs.
        resume: take up the newest saved state of a run that did not finish.
        progress: makes progress bars.
        notice: told, in a line, what was decided about memory.
        stop: polled after every step; a signal number saves the state and ends the run.

    Returns:
        Figures of the run and of every matrix.

    Raises:
        SculptorError: if an input or the output cannot be used, or the run cannot go on.
    """
    settings = settings or TrainSettings()
    output = Path(output).resolve()
    device = resolve_device(settings.device)
    make_accelerator(device)  # refuses several processes before any work
    if settings.eval_every is not None and not eval_data:
        raise SettingsError("--eval-every without effect: there is no --eval-data")
    job = _open_job(model, subspaces, data, eval_data, settings, progress)
    plan, reason = choose(plans_of(job, device), device, job.settings.offload, output, partial_path(output))
    placed, unused = _placed(job.settings, plan.offload)
    if unused:
        reason += f"; without effect there: {', '.join(unused)}"
    if not reason.endswith(("as asked", "everything fits")):
        notice(reason)
    job = replace(job, settings=placed, placement=reason)
    check_apart(output, [job.checkpoint.path, subspaces, *data, *eval_data])
    with staging(output, overwrite=overwrite, resume=resume, worth_keeping=has_state) as partial:
        scratch = partial / "scratch"
        loaded, updates = prepare(job, device, scratch, progress)
        try:
            loop = TrainingLoop(
                loaded,
                updates,
                job.encoded.examples,
                job.settings,
                store=StateStore(partial / STATE_NAME, _run_key(job), updates.fingerprints()),
                metrics=partial / "metrics.jsonl",
                evaluate=_evaluator(loaded, job),
                stop=stop,
            )
            result = loop.run(progress)
            del loop
            report = write_output(job, loaded, updates, result, output, partial, progress)
        finally:
            updates.close()
            shutil.rmtree(scratch, ignore_errors=True)
        commit(partial / "output", output)
        shutil.rmtree(partial)
    return report


def _open_job(
    model: str | Path,
    subspaces: str | Path,
    data: Sequence[str | Path],
    eval_data: Sequence[str | Path],
    settings: TrainSettings,
    progress: Progress,
) -> TrainJob:
    checkpoint = open_checkpoint(model)
    architecture = inspect_architecture(checkpoint)
    check_head(checkpoint, architecture)
    archive = Archive(subspaces)
    if not any(record.staircase.num_free for record in archive.values()):
        raise CapacityError(f"{archive.path}: no capacity left: all {len(archive)} matrices are frozen")
    settings = resolve_settings(settings, archive)  # refuses before any work
    archive.check_base(checkpoint, progress)
    tokenizer = load_tokenizer(checkpoint, architecture.kind)
    settings = replace(settings, max_length=resolve_max_length(settings.max_length, architecture.max_positions))
    assert settings.max_length is not None
    files = tuple(map(str, data))
    if not files:
        raise DataError("no data: pass at least one file")
    kind, size = architecture.kind, architecture.vocab_size
    encoded = encode(read_rows(files, settings.max_rows), tokenizer, kind, settings.max_length, size)
    evaluation = None
    if eval_data:
        evaluation = encode(read_rows(tuple(map(str, eval_data))), tokenizer, kind, settings.max_length, size)
    extra = _select_extra(architecture, archive, settings.also_train)
    name = Path(files[0]).stem if Path(files[0]).stem != "train" else Path(files[0]).resolve().parent.name
    return TrainJob(checkpoint, architecture, archive, settings, files, encoded, evaluation, name, extra)


def resolve_settings(settings: TrainSettings, archive: Archive) -> TrainSettings:
    """The settings with the defaults that depend on the archive filled in.

    Raises:
        SettingsError: if the archive cannot go on like that, or a setting would have no effect.
    """
    carry = resolve_carry(settings.carry, archive)
    has_moments = carry == "merge"
    given = {
        "--soften": bool(settings.soften),
        "--memory-rows": settings.memory_rows is not None,
        "--memory-weight": settings.memory_weight is not None,
    }
    unused = [option for option, used in given.items() if used and not has_moments]
    if unused:
        raise SettingsError(
            f"{', '.join(unused)} without effect: an archive with basis {archive.manifest.basis} has no moments; analyze "
            "with --basis inputs or curvature"
        )
    curvature = archive.manifest.basis == "curvature"
    return replace(
        settings,
        carry=carry,
        learning_rate=settings.learning_rate or (1e-3 if curvature else DEFAULT_RATE),
        soften=settings.soften if settings.soften is not None else (3.0 if curvature else 0.0),
        memory_rows=settings.memory_rows or MEMORY_ROWS,
        memory_weight=settings.memory_weight or 1.0,
    )


def resolve_carry(asked: Carry | None, archive: Archive) -> Carry:
    """How an archive goes on: by default `merge` where it has moments, else `accumulate`.

    Raises:
        SettingsError: if the archive cannot go on like that.
    """
    has_moments = any(record.has_moments for record in archive.values())
    carry = asked or ("merge" if has_moments else "accumulate")
    if has_moments != (carry == "merge"):
        fitting = "merge" if has_moments else "accumulate or retake"
        raise SettingsError(f"--carry {carry}: an archive with basis {archive.manifest.basis} goes on by {fitting}")
    return carry


def _select_extra(architecture: Architecture, archive: Archive, patterns: Sequence[str]) -> dict[str, str]:
    """Openly trained parameters: parameter of the model -> tensor of the checkpoint."""
    candidates = {
        parameter: name
        for parameter, name in architecture.tensors.items()
        if name not in archive and parameter in architecture.parameters
    }
    chosen: dict[str, str] = {}
    for pattern in patterns:
        found = {
            p: name for p, name in candidates.items() if fnmatch.fnmatchcase(p, pattern) or pattern in p.split(".")
        }
        if not found:
            raise SettingsError(
                f"--also-train {pattern!r} matches no unprotected parameter; use a glob on names like {next(iter(candidates))}"
            )
        chosen |= found
    return chosen


def plans_of(job: TrainJob, device: torch.device) -> dict[str, Footprint]:
    """What each way of training would take."""
    longest = max((example.length for example in job.encoded.examples), default=1)
    settings = job.settings
    rows = min(settings.batch_size, max(1, len(job.encoded.examples)))
    micro = min(settings.micro_batch_size, rows)
    assert settings.carry is not None
    steps = settings.total_steps(-(-len(job.encoded.examples) // rows))
    work = Workload(
        tokens=rows * longest,
        micro_batches=-(-rows // micro),
        fused=job.settings.optimizer_mode == "fused",
        keep_inputs=job.settings.offload_inputs is False,
        on_host=optimizer_on_host(job.settings, "cpu", device),
        recompute=device.type == "cuda" if settings.checkpoint_activations is None else settings.checkpoint_activations,
        num_extra=sum(prod(job.checkpoint.infos[name].shape) for name in set(job.extra.values())),
        written=output_bytes(job.checkpoint, job.archive, settings.carry, cast_to(settings)),
        saves=-(-steps // settings.steps_between_saves(steps)),
        evaluates=job.evaluation is not None,
        row=longest,
        micro_rows=micro,
    )
    shapes = archive_shapes(job.archive, job.architecture)
    return footprints(job.checkpoint, job.architecture, shapes, device, work)


def _placed(settings: TrainSettings, offload: Offload) -> tuple[TrainSettings, list[str]]:
    """The settings for where `auto` put the model, and the options that have no effect there."""
    resident = offload == "none"
    # By name: whether it matters there, the option, and the values that ask for what is done anyway, default first.
    concerns: dict[str, tuple[bool, str, tuple[Any, Any]]] = {
        "optimizer_on": (offload == "cpu", "--optimizer-on", ("auto", "device")),
        "optimizer_mode": (not resident, "--optimizer-mode fused", ("exact", "exact")),
        "offload_inputs": (not resident, "--offload-inputs", (None, False)),
        "checkpoint_activations": (resident, "--keep-activations", (None, True)),
    }
    idle = {name: (option, same) for name, (matters, option, same) in concerns.items() if not matters}
    unused = [option for name, (option, same) in idle.items() if getattr(settings, name) not in same]
    return replace(settings, offload=offload, **{name: same[0] for name, (_, same) in idle.items()}), unused


def _evaluator(loaded: LoadedModel, job: TrainJob) -> Callable[[], float] | None:
    if job.evaluation is None:
        return None
    examples, size = job.evaluation.examples, job.settings.micro_batch_size
    accelerator = make_accelerator(loaded.device)

    def evaluate() -> float:
        with accelerator.autocast():
            return mean_loss(loaded, examples, size)[0]

    return evaluate


def _run_key(job: TrainJob) -> dict[str, Any]:
    """What has to be the same for a saved state to be taken up."""
    settings = asdict(job.settings)
    for name in _HOW:
        settings.pop(name)
    examples = [job.encoded.examples, job.evaluation.examples if job.evaluation else ()]
    return settings | {
        "base": job.archive.manifest.base_identity,
        "subspaces": _archive_identity(job.archive),
        "data": [digest_examples(part) for part in examples],
        "threads": torch.get_num_threads(),
    }


def _archive_identity(archive: Archive) -> str:
    """Of its tensors and its staircases: archives under other budgets share their tensors."""
    steps = {f"{name} steps": str(record.steps) for name, record in archive.items()}
    return identity({name: stored.sha256 for name, stored in archive.manifest.tensors.items()} | steps)
