"""`train --select-rows`: the rows that the model predicts worst, by one pass before the first step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from sculptor.data.examples import IGNORED, Example
from sculptor.jobs.job import TrainJob
from sculptor.model.load import LoadedModel
from sculptor.model.loss import SLICE, row_errors
from sculptor.progress import Progress
from sculptor.training.precision import autocast
from sculptor.world import World

_MASKING_SEED = 0  # of masked models, as in an evaluation


def select_rows(
    job: TrainJob, loaded: LoadedModel, progress: Progress, notice: Callable[[str], object], world: World
) -> TrainJob:
    """The job with the share of its rows that has the largest mean ||p - y||, in their order; what is replayed stays.

    Args:
        job: with `select_rows` set.
        loaded: its model, as it is before the first step.
        progress: makes progress bars.
        notice: told how many rows were chosen.
        world: processes that share the run; all of them look at all rows, and do as the first says.
    """
    examples = job.encoded.examples
    count = job.settings.num_selected(len(examples))
    with closing(progress(total=len(examples), desc="select rows", unit="row")) as bar:
        errors: dict[int, float] = {}
        loaded.model.eval()
        for chosen in _parts(examples, loaded, job.settings.micro_rows):
            batch = loaded.batch([examples[i] for i in chosen], _MASKING_SEED).to(loaded.device)
            with torch.no_grad(), autocast(job.settings.precision, loaded.device):
                errors |= zip(chosen, row_errors(loaded.model, batch, loaded.kind).tolist(), strict=True)
            bar.update(len(chosen))
    ranked = sorted(errors, key=lambda i: (-errors[i], i))
    kept = world.from_first(sorted(ranked[:count]))
    notice(f"--select-rows {job.settings.select_rows}: {count:,} of {len(examples):,} rows are trained on")
    return replace(job, encoded=replace(job.encoded, examples=tuple(examples[i] for i in kept)))


def _parts(examples: Sequence[Example], loaded: LoadedModel, rows: int) -> Iterator[list[int]]:
    """Rows by length, as many at a time as their logits allow."""
    limit = SLICE[loaded.device.type] // int(loaded.model.get_input_embeddings().weight.shape[0])
    part: list[int] = []
    tokens = 0
    for i in sorted(range(len(examples)), key=lambda i: -examples[i].length):
        count = sum(label != IGNORED for label in examples[i].labels)
        if part and (len(part) == rows or tokens + count > limit):
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += count
    yield part
