"""`train --replay self`: rows that the model says before the first step, a new one for every place that it has in the run.

Few of them again and again would be learned by heart: 44 samples of an archive, a tenth of the rows of six tasks, took
SmolLM2's harm from 0.016 to 0.86 (docs/harm.md).
"""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sculptor.checkpoint.staging import write_bytes
from sculptor.data.chat import use_template
from sculptor.data.examples import Example
from sculptor.errors import CheckpointError, DataError
from sculptor.jobs.job import TrainJob, open_model, read_offload
from sculptor.methods.settings import SELF
from sculptor.model.load import LoadedModel
from sculptor.model.samples import sequences_as_tensors, sequences_of, usual_length
from sculptor.model.sampling import sample_examples
from sculptor.progress import Progress
from sculptor.world import World

OWN_ROWS = "own_rows.safetensors"
_MOST = 4096  # rows; a longer run has them again
_SEED = 3  # beyond the training's, apart from what archives are made of and harm is measured on
_LIKELY = 0.8  # of the longest, until there is a mean: how long a conversation is
_ROUNDS = 8


def draw_own_rows(
    job: TrainJob,
    device: torch.device,
    partial: Path,
    progress: Progress,
    notice: Callable[[str], object],
    world: World,
) -> TrainJob:
    """The job with what the model says in the place of `self`; as it was where nothing of it is mixed in.

    Args:
        job: with its steps.
        device: where to compute.
        partial: staging directory, where they stay, so that a run that is taken up has the same.
        progress: makes progress bars.
        notice: told how many are drawn.
        world: processes that share the run; the first draws.

    Raises:
        CheckpointError: if the model cannot say anything.
        DataError: if what it says is empty.
    """
    own = next((replay for replay in job.replays if replay.name == SELF), None)
    if own is None:
        return job
    assert job.steps is not None
    count = min(_MOST, math.ceil(own.share * job.steps.total * job.steps.rows))
    asked = {"model": job.archive.manifest.base_identity, "seed": job.settings.seed, "rows": count}

    def rows() -> tuple[Example, ...]:
        path = partial / OWN_ROWS
        found = _read(path, asked)
        if found is None:
            notice(f"--replay self: {count:,} rows that the model says are drawn first")
            found = _draw(job, count, device, progress)
            write_bytes(path, _packed(found, asked))
        return found

    drawn = world.once(rows)
    return replace(job, replays=tuple(replace(each, examples=drawn) if each is own else each for each in job.replays))


def _draw(job: TrainJob, count: int, device: torch.device, progress: Progress) -> tuple[Example, ...]:
    assert job.settings.max_length is not None
    offload = read_offload(job.settings.offload)
    with closing(open_model(job.checkpoint, device, job.architecture, offload, progress=progress)) as loaded:
        use_template(loaded.tokenizer, job.settings.chat_template)
        try:
            return _say(loaded, count, job.settings.max_length, job.settings.seed + _SEED, progress)
        except (CheckpointError, DataError) as cause:
            raise type(cause)(f"--replay self: {cause}") from cause


def _say(loaded: LoadedModel, count: int, max_length: int, seed: int, progress: Progress) -> tuple[Example, ...]:
    """As many rows, or as they come in a few rounds; conversations of a model that has a chat template."""
    chat = bool(loaded.tokenizer.chat_template)
    length = usual_length(loaded, max_length)
    found: list[Example] = []
    for i in range(_ROUNDS):
        lacking = count - len(found)
        if lacking <= 0:
            break
        mean = sum(example.length for example in found) / len(found) if found else length * (_LIKELY if chat else 1)
        found += sample_examples(
            loaded, math.ceil(lacking * mean), length, chat=chat, seed=seed + (i << 32), progress=progress,
            name="sample, to mix in",
        )  # fmt: skip
    return tuple(found[:count])


def _packed(examples: tuple[Example, ...], asked: Mapping[str, object]) -> bytes:
    content: bytes = save(sequences_as_tensors(examples), {"asked": json.dumps(asked, sort_keys=True)})
    return content


def _read(path: Path, asked: Mapping[str, object]) -> tuple[Example, ...] | None:
    """What a run before has drawn for the same; None if there is nothing, or something else."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("asked") != json.dumps(asked, sort_keys=True):
                return None
            return tuple(sequences_of({name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None
