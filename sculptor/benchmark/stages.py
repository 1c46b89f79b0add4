"""What is measured after every stage: scores on all tasks, the loss on watched texts, and the harm to what the base says.

Harm, KL(base || new), is measured on samples of the first base that are drawn once for a run, with another seed than whatever an
archive holds: no step and no analysis of any method sees them, and all methods of one plan and seed have the same.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from sculptor.benchmark.inputs import Inputs
from sculptor.benchmark.plan import Plan
from sculptor.benchmark.results import Measured, TaskScore
from sculptor.checkpoint.staging import write_bytes
from sculptor.data.examples import resolve_max_length
from sculptor.data.rows import Row
from sculptor.errors import OutputError
from sculptor.evaluation.rows import Evaluation, Generation, evaluate_rows
from sculptor.model.harm import Harm, measure_harm
from sculptor.model.load import LoadedModel
from sculptor.model.samples import SUFFIX, kept_samples, parse_samples
from sculptor.progress import Progress
from sculptor.tasks.routed import RoutedModel
from sculptor.validation import read_file
from sculptor.world import World

SAMPLES_NAME = f"base_samples{SUFFIX}"
# Of each prediction: the file goes with the run, so that the bound may be closer than an archive's (docs/harm.md).
KEPT = 512
_SEED = 2  # beyond that of the analysis, which calibrates on its own seed and keeps samples of the one after it


def count_memory(device: torch.device) -> None:
    """Begins to count a GPU's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes of a GPU's memory at a time since; None on anything else."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def draw_once(loaded: LoadedModel, plan: Plan, partial: Path, progress: Progress) -> str | None:
    """Leaves samples of the base in a run's directory; why there are none, if there are none."""
    length = resolve_max_length(plan.evaluate.max_length, loaded.architecture.max_positions)
    content, reason = kept_samples(loaded, length, plan.analyze.seed + _SEED, progress, kept=KEPT)
    if content is None:
        return reason
    write_bytes(partial / SAMPLES_NAME, content)
    return None


def harm_to_base(loaded: LoadedModel, partial: Path, world: World) -> Harm | None:
    """KL(base || new) of a stage; None if the run has no samples.

    Raises:
        OutputError: if they cannot be read.
    """
    path = partial / SAMPLES_NAME
    remedy = "pass --overwrite to start anew"
    content = world.once(lambda: read_file(path, OutputError, remedy) if path.is_file() else None)
    if content is None:
        return None
    try:
        samples = parse_samples(content, loaded.architecture.vocab_size)
    except ValueError as cause:
        raise OutputError(f"{path}: damaged ({cause}); {remedy}") from cause
    return measure_harm(loaded.model, samples.all, loaded.device, pad_id=loaded.pad_id, world=world)


def measure_stage(
    loaded: LoadedModel,
    plan: Plan,
    inputs: Inputs,
    partial: Path,
    progress: Progress,
    world: World,
    routed: RoutedModel | None = None,
) -> Measured:
    """Everything that is measured of one model; rows of one that is `routed` have weights of their own, and no harm."""
    options = plan.evaluate
    generation = Generation(exact_match=None if options.exact_match else False, answers=True)

    def measure(rows: Sequence[Row], labels: Sequence[str] | None, generation: Generation) -> Evaluation:
        if routed is not None:
            return routed.evaluate(rows, labels, generation)
        return evaluate_rows(
            loaded,
            rows,
            labels,
            options.max_length,
            options.batch_size,
            generation=generation,
            progress=progress,
            world=world,
        )

    scores = {}
    for task in plan.tasks:
        found = measure(inputs.rows[task.name], task.labels, generation)
        scores[task.name] = TaskScore(found.accuracy, found.exact_match, _loss(found))
    texts = {name: measure(rows, None, Generation(exact_match=False)) for name, rows in inputs.watched.items()}
    tokens = sum(found.num_tokens for found in texts.values())
    total = sum(_loss(found) * found.num_tokens for found in texts.values()) / tokens if texts else None
    harm = None if routed is not None else harm_to_base(loaded, partial, world)
    return Measured(scores, total, {name: _loss(found) for name, found in texts.items()}, harm)


def _loss(found: Evaluation) -> float:
    assert found.loss is not None
    return found.loss
