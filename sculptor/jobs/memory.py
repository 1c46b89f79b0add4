"""How many of a task's rows are measured for an archive: as many as a machine bears; a run that goes on keeps its number."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sculptor.analysis.sources import spread_rows
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.examples import Example
from sculptor.jobs.defaults import tokens_for
from sculptor.jobs.job import MEMORY_ROWS, TrainJob
from sculptor.training.state import STATE_NAME, saved_key
from sculptor.world import World

# On a CPU at least: with fewer than 48 rows nothing was measured, and 48 kept as much as 384 (docs/benchmarks.md).
_LEAST = 48


def fit_memory(
    job: TrainJob,
    asked: int | None,
    partial: Path | None,
    device: torch.device,
    notice: Callable[[str], object],
    world: World,
    said: str = "--memory-rows {}",
    keep: str = "--carry keep",
) -> TrainJob:
    """The job with the number of rows that it measures, told in a line if these are fewer than the task has.

    Args:
        job: with resolved settings.
        asked: for by the user, which stays.
        partial: staging directory, where a saved state may say what the run began with.
        device: where rows are measured.
        notice: told what was chosen.
        world: the processes that share the run.
        said, keep: how the user would ask for a number, and for none.
    """
    settings, examples = job.settings, job.encoded.examples
    if asked is not None or settings.memory_rows is None:
        return job
    began = None if partial is None else world.from_first(_began_with(partial))
    count = began or rows_for(job.checkpoint, examples, device)
    if count < min(MEMORY_ROWS, len(examples)):
        notice(
            f"chosen: {said.format(count)}: the next task's archive is measured on so many of the {len(examples):,} rows; each "
            f"takes about as long as to train on it, and none is with {keep}"
        )
    return replace(job, settings=replace(settings, memory_rows=count))


def _began_with(partial: Path) -> int | None:
    found = saved_key(partial / STATE_NAME).get("memory_rows")
    return found if type(found) is int and found > 0 else None


def rows_for(checkpoint: Checkpoint, examples: Sequence[Example], device: torch.device) -> int:
    """384 rows; on a CPU as many as hold the tokens that an analysis takes there unless told otherwise, 48 to 384."""
    if device.type != "cpu" or not examples:
        return MEMORY_ROWS
    tokens = sum(example.length for example in examples)
    return min(max(tokens_for(checkpoint, device) * len(examples) // max(1, tokens), _LEAST), MEMORY_ROWS)


def memory_of(job: TrainJob) -> tuple[Example, ...]:
    """The rows that are measured: evenly over those of an epoch."""
    assert job.settings.memory_rows is not None
    return spread_rows(job.encoded.of_an_epoch(job.settings.seed), job.settings.memory_rows)
