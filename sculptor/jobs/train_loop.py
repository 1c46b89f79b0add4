"""The loop of a training, made of a job: what it evaluates, how it keeps harm below a limit, and which saved state is its own."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sculptor.checkpoint.tokenizers import speech_digest
from sculptor.data.examples import digest_examples
from sculptor.evaluation.loss import mean_loss
from sculptor.jobs.job import TrainJob
from sculptor.jobs.precision import SECTION as PRECISION
from sculptor.model.load import LoadedModel
from sculptor.model.samples import SECTION
from sculptor.progress import Progress
from sculptor.training.base import BaseWeights
from sculptor.training.harm import HarmControl
from sculptor.training.loop import TrainingLoop
from sculptor.training.precision import autocast
from sculptor.training.state import STATE_NAME, StateStore, check_saved
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


def make_loop(
    job: TrainJob,
    loaded: LoadedModel,
    updates: Updates,
    partial: Path,
    stop: Callable[[], int | None],
    told: Callable[[Mapping[str, float]], object],
    progress: Progress,
    world: World,
) -> TrainingLoop:
    """The loop over a job's rows.

    Args:
        job: with everything decided.
        loaded: its model, prepared for training.
        updates: what is trained in it.
        partial: staging directory, for states and metrics.
        stop: polled after every step; a signal number ends the run.
        told: every line of the metrics.
        progress: makes progress bars.
        world: the processes that share a step.
    """
    rows, key = job.of_steps, _run_key(job, loaded, progress)
    return TrainingLoop(
        loaded,
        updates,
        rows.examples,
        job.settings,
        store=StateStore(partial / STATE_NAME, key, updates.fingerprints(), _split(job, world)),
        metrics=partial / "metrics.jsonl",
        evaluate=_evaluator(loaded, job),
        harm=_harm_control(loaded, updates, job, world),
        as_base=None if job.settings.kl_weight is None else BaseWeights(loaded.model, updates.extra),
        stop=stop,
        world=world,
        mixture=rows.mixture,
        report=told,
    )


def _evaluator(loaded: LoadedModel, job: TrainJob) -> Callable[[], float] | None:
    if job.evaluation is None:
        return None
    examples, size = job.evaluation.examples, job.settings.micro_rows

    def evaluate() -> float:
        with autocast(job.settings.precision, loaded.device):
            return mean_loss(loaded, examples, size, world=here())[0]

    return evaluate


def _harm_control(loaded: LoadedModel, updates: Updates, job: TrainJob, world: World) -> HarmControl | None:
    if job.samples is None:
        return None
    settings = job.settings
    computing = functools.partial(autocast, settings.precision, loaded.device)
    assert settings.harm_every is not None
    return HarmControl(
        loaded, updates, job.samples, settings.harm_every, settings.max_harm, computing, world, job.named
    )


def check_taken_up(job: TrainJob, partial: Path) -> None:
    """Refuses a saved state of other settings or rows before the model is loaded; the loop compares everything.

    Raises:
        OutputError: naming what differs.
    """
    check_saved(partial / STATE_NAME, _asked_key(job))


def _asked_key(job: TrainJob) -> dict[str, Any]:
    """What was asked for, of what has to be the same for a saved state to be taken up."""
    settings = asdict(job.settings)
    for name in (*_HOW, *_SPLIT):
        settings.pop(name)
    return settings | {
        "eval_data": None if job.evaluation is None else f"{len(job.evaluation.examples)} rows",
        "base": job.archive.manifest.base_identity,
        "subspaces": job.archive.identity,
        "rows": job.rows_digest,
    }


def _run_key(job: TrainJob, loaded: LoadedModel, progress: Progress) -> dict[str, Any]:
    """What has to be the same for a saved state to be taken up."""
    key, rows = _asked_key(job), job.of_steps
    examples = [rows.examples, job.evaluation.examples if job.evaluation else ()]
    if job.architecture.kind == "masked":
        key["mask"] = [loaded.tokenizer.mask_token_id, loaded.pad_id, len(loaded.tokenizer)]
    sections = job.archive.manifest.sections
    parts = {"samples": sections.get(SECTION)}
    if job.settings.optimizer == "bayes-adam":
        parts["precision of numbers"] = sections.get(PRECISION)  # `precision` is a setting
    return key | {
        "mixture": None if rows.mixture is None else asdict(rows.mixture),
        **{name: None if part is None else part.sha256 for name, part in parts.items()},
        "model": job.checkpoint.digests_beside({record.tensor for record in job.archive.values()}, progress),
        "tokenizer and generation": speech_digest(job.checkpoint.path),
        "tokens": [digest_examples(part) for part in examples],
    }


def _split(job: TrainJob, world: World) -> dict[str, int]:
    """How a step is split: decides rounding, and differs with the number of processes."""
    given = {name: getattr(job.settings, name) for name in _SPLIT}
    return {"processes": world.size, "threads": torch.get_num_threads(), **given}
