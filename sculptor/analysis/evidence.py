"""From calibration rows to what is known of every matrix: moments summed over sources, a few blocks at a time.

Each source of rows (a file, a finished task) gives moments of unit trace; their weighted sum is handed on, matrix by
matrix, to the method that makes rules of it.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.analysis.calibration import MeasuredMoments, measure_moments, passes
from sculptor.checkpoint.architecture import Target
from sculptor.checkpoint.orientation import to_device
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.examples import Example
from sculptor.methods.method import Evidence, Measures, Moment
from sculptor.methods.settings import AnalyzeSettings
from sculptor.model.load import LoadedModel
from sculptor.progress import Bar, Progress


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """Calibration rows whose moments are scaled to one trace; `protects` is the name that they stand for, if any."""

    name: str
    examples: Sequence[Example]
    weight: float = 1.0
    protects: str = ""


def weigh(
    checkpoint: Checkpoint, target: Target, device: torch.device, stored: Tensor | None = None
) -> functools.partial[Tensor]:
    """What reads a matrix as evidence: (m, n), float64, finite; `stored` if it was read before."""
    return functools.partial(_read_weight, checkpoint, target, device, stored)


def _read_weight(checkpoint: Checkpoint, target: Target, device: torch.device, stored: Tensor | None) -> Tensor:
    weight = (checkpoint.matrix(target) if stored is None else stored).to(device)  # looked at there
    return to_device(checkpoint.check_finite(target, weight), target.transposed, device)


def measure_evidence(
    loaded: LoadedModel,
    targets: Sequence[Target],
    sources: Sequence[Source],
    measures: Measures,
    settings: AnalyzeSettings,
    progress: Progress,
    task: int = 0,
) -> Iterator[Iterator[Evidence]]:
    """Evidence of every target, in order, a few blocks at a time; without moments of those that no row reaches.

    Args:
        loaded: an unprotected model.
        targets: which matrices.
        sources: their calibration rows.
        measures: inputs, or gradients too.
        settings: labels, weighting, seed, memory.
        progress: makes progress bars.
        task: position in the history that the evidence is of.

    Yields:
        That of the blocks of one pass over the rows; all of it is to be taken before the next pass is asked for.
    """
    gradients = measures == "gradients"
    calibrating, deriving = ("calibrate", "derive") if task == 0 else ("measure the task", "derive the next archive")
    groups = plan_passes(loaded, targets, sources, measures, settings)
    rows = sum(len(source.examples) for source in sources)
    made = 0
    for turn, chosen in enumerate(groups):
        with closing(progress(total=rows * len(groups), desc=calibrating, unit="row", initial=rows * turn)) as bar:
            total = MeasuredMoments()
            traces: dict[str, list[float]] = defaultdict(list)
            for i, source in enumerate(sources):
                found = measure_moments(
                    loaded,
                    chosen,
                    source.examples,
                    gradients=gradients,
                    labels=settings.fisher,
                    weighting=settings.weighting or ("gradients" if gradients else "tokens"),
                    seed=settings.seed + i,
                    device_memory=settings.device_memory,
                    bar=bar,
                )
                _add(total.inputs, found.inputs, traces, "input ", source.weight)
                _add(total.outputs, found.outputs, traces, "output ", source.weight)
        with closing(progress(total=len(targets), desc=deriving, unit="matrix", initial=made)) as bar:
            yield _evidence_of(loaded, chosen, total, traces, len(sources), gradients, task, bar)
            made += len(chosen)


def _evidence_of(
    loaded: LoadedModel,
    targets: Sequence[Target],
    total: MeasuredMoments,
    traces: Mapping[str, Sequence[float]],
    num_sources: int,
    gradients: bool,
    task: int,
    bar: Bar,
) -> Iterator[Evidence]:
    """What was measured in a pass, matrix by matrix; moments are given away."""
    reached = {target.name for target in targets if _is_reached(target, total, gradients)}
    inputs = {group: Moment(total.inputs.pop(group)) for group in list(total.inputs)}
    last = {target.input_group: target.name for target in targets}
    for target in targets:
        bar.update(1)
        group = target.input_group
        if target.name not in reached:
            yield _unreached(loaded, target, num_sources, task)
            continue
        of_inputs = traces["input " + group]
        of_outputs = traces["output " + target.name] if gradients else [0.0] * len(of_inputs)
        yield Evidence(
            name=target.name,
            shape=target.shape,
            weight=weigh(loaded.checkpoint, target, loaded.device),
            inputs=inputs.pop(group) if last[group] == target.name else inputs[group],
            outputs=Moment(total.outputs.pop(target.name)) if gradients else None,
            traces=tuple(zip(of_inputs, of_outputs, strict=True)),
            task=task,
        )


def plan_passes(
    loaded: LoadedModel,
    targets: Sequence[Target],
    sources: Sequence[Source],
    measures: Measures,
    settings: AnalyzeSettings,
    processes: int = 1,
) -> list[list[Target]]:
    """Targets by blocks, as many of these at a time as fit; as many passes for every process, where there are blocks enough."""
    gradients = measures == "gradients"
    model_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    if loaded.stream is not None:
        model_bytes += loaded.stream.slots.num_bytes
    copies = min(2, len(sources))  # of one source, and the sum over those before
    found = passes(targets, gradients, loaded.device, settings.device_memory, model_bytes, copies)
    if processes == 1:
        return found
    blocks: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        blocks[target.block].append(target)
    units, count = list(blocks.values()), -(-len(found) // processes) * processes
    bounds = [len(units) * i // count for i in range(count + 1)]
    parts = [[target for unit in units[a:b] for target in unit] for a, b in itertools.pairwise(bounds)]
    return [part for part in parts if part]


def _add(
    total: dict[str, Tensor], found: dict[str, Tensor], traces: dict[str, list[float]], side: str, weight: float
) -> None:
    """Adds moments of unit trace, in place and one at a time; `traces` remembers what they were."""
    for key in list(found):
        moment = found.pop(key)
        trace = float(moment.diagonal().to(torch.float64).sum())
        traces[side + key].append(trace)
        moment *= weight / trace if trace > 0 else 0.0
        if key in total:
            total[key] += moment
        else:
            total[key] = moment


def _is_reached(target: Target, total: MeasuredMoments, gradients: bool) -> bool:
    return target.input_group in total.inputs and (not gradients or target.name in total.outputs)


def _unreached(loaded: LoadedModel, target: Target, num_sources: int, task: int) -> Evidence:
    """Of a matrix that no row reached: an expert that no token was sent to, or a weight that is used past its module."""
    return Evidence(
        name=target.name,
        shape=target.shape,
        weight=weigh(loaded.checkpoint, target, loaded.device),
        traces=((0.0, 0.0),) * num_sources,
        task=task,
    )
