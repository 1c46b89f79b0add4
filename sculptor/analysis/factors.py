"""From calibration rows to what an archive keeps of every matrix: truncated moments, profiles, and the staircase.

Each source of rows (a file, a finished task) gives moments of unit trace; their weighted sum, added to what an earlier
archive holds, is decomposed, truncated and handed out block by block. The staircases follow once all eigenvalues are
known, since one threshold may serve the whole model.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sculptor.analysis.calibration import Moments, measure_moments, passes
from sculptor.analysis.settings import AnalyzeSettings
from sculptor.archive.manifest import MatrixRecord, SideRecord
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Target
from sculptor.data.examples import Example
from sculptor.model.load import LoadedModel
from sculptor.numerics.allocation import Importance, allocate, least_free_share
from sculptor.numerics.moments import Factor, profile, rotate_profile, truncate, whole_spectrum
from sculptor.progress import Progress


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """Calibration rows whose moments are scaled to one trace."""

    name: str
    examples: Sequence[Example]
    weight: float = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class Side:
    """One side of a matrix: its truncated moment, and each task's profile in it (tasks, 65)."""

    factor: Factor
    profiles: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class MatrixFactors:
    """What calibration gives for one matrix; `output` is None where only inputs are measured.

    `traces` are (tr C, tr G) of every source, before these are scaled.
    """

    target: Target
    output: Side | None
    input: Side
    traces: tuple[tuple[float, float], ...]


def derive_factors(
    loaded: LoadedModel,
    targets: Sequence[Target],
    sources: Sequence[Source],
    settings: AnalyzeSettings,
    previous: Archive | None,
    progress: Progress,
) -> Iterator[MatrixFactors]:
    """Truncated moments of every target, in order, a few blocks at a time.

    Args:
        loaded: an unprotected model.
        targets: which matrices.
        sources: their calibration rows.
        settings: basis, labels, weighting, share of columns kept, seed.
        previous: an archive whose moments are added, or None.
        progress: makes progress bars.
    """
    gradients = settings.basis == "curvature"
    model_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    if loaded.stream is not None:
        model_bytes += loaded.stream.slots.num_bytes
    copies = min(2, len(sources))  # of one source, and the sum over those before
    groups = passes(targets, gradients, loaded.device, settings.device_memory, model_bytes, copies)
    rows = sum(len(source.examples) for source in sources)
    bar = progress(total=rows * len(groups), desc="calibrate", unit="row")
    for chosen in groups:
        total = Moments()
        traces: dict[str, list[float]] = defaultdict(list)
        for i, source in enumerate(sources):
            found = measure_moments(
                loaded,
                chosen,
                source.examples,
                gradients=gradients,
                labels=settings.fisher,
                weighting=settings.input_weighting,
                seed=settings.seed + i,
                bar=bar,
            )
            _accumulate(total.inputs, found.inputs, traces, "input ", source.weight)
            _accumulate(total.outputs, found.outputs, traces, "output ", source.weight)
            _check_reached(chosen, total, gradients)
        yield from _decompose(chosen, total, traces, settings, previous)
    bar.close()


def _accumulate(
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


def _check_reached(targets: Sequence[Target], total: Moments, gradients: bool) -> None:
    absent = [
        target.name
        for target in targets
        if target.input_group not in total.inputs or (gradients and target.name not in total.outputs)
    ]
    if absent:
        raise ValueError(f"no row reaches {len(absent)} matrices, first {absent[0]}; leave them out with --exclude")


def _decompose(
    targets: Sequence[Target],
    total: Moments,
    traces: Mapping[str, list[float]],
    settings: AnalyzeSettings,
    previous: Archive | None,
) -> Iterator[MatrixFactors]:
    inputs: dict[str, Side] = {}
    gradients = settings.basis == "curvature"
    for target in targets:
        record = previous[target.name] if previous is not None else None
        if target.input_group not in inputs:
            side = record.input if record is not None else None
            inputs[target.input_group] = _side(
                total.inputs.pop(target.input_group), settings, previous, target.name, side
            )
        output = None
        if target.name in total.outputs:
            side = record.output if record is not None else None
            output = _side(total.outputs.pop(target.name), settings, previous, target.name, side)
        of_inputs = traces["input " + target.input_group]
        of_outputs = traces["output " + target.name] if gradients else [0.0] * len(of_inputs)
        pairs = tuple(zip(of_inputs, of_outputs, strict=True))
        yield MatrixFactors(target, output, inputs[target.input_group], pairs)


def _side(
    moment: Tensor, settings: AnalyzeSettings, previous: Archive | None, name: str, side: SideRecord | None
) -> Side:
    """One moment, with what an earlier archive holds of it, as it will be stored."""
    k = kept_directions(moment.shape[0], settings.keep)
    if previous is None or side is None:
        factor = truncate(moment, k)
        return Side(_stored(factor, settings), profile(moment, factor.vectors)[None].cpu())
    old = previous.factor(name, side)
    old_vectors = old.vectors.to(moment.device)
    factor = truncate(moment + old.dense(moment.device).to(moment.dtype), k)
    profiles = previous.profiles(side)
    assert profiles is not None
    carried = [rotate_profile(row.to(moment.device), old_vectors, factor.vectors) for row in profiles]
    return Side(_stored(factor, settings), torch.stack([*carried, profile(moment, factor.vectors)]).cpu())


def _stored(factor: Factor, settings: AnalyzeSettings) -> Factor:
    """On the CPU, in the dtype of the archive: a pass's shared inputs wait for all their readers."""
    return Factor(factor.vectors.to("cpu", getattr(torch, settings.dtype)), factor.values.cpu(), factor.rest)


def kept_directions(dim: int, keep: float) -> int:
    """How many leading directions of a side are stored."""
    return max(1, min(dim, round(keep * dim)))


def decide_staircases(
    records: Sequence[MatrixRecord],
    values: Mapping[str, Tensor],
    settings: AnalyzeSettings,
    weights: Sequence[float],
) -> list[MatrixRecord]:
    """The records with their steps and the share of curvature these protect.

    Args:
        records: of all matrices.
        values: eigenvalues by the name of their tensor.
        settings: budget, steps and whether one threshold serves all.
        weights: of the sources, as in `MatrixRecord.traces`.

    Raises:
        ValueError: if the stored directions cannot freeze as much as the budget asks for.
    """
    budget = settings.free_budget
    scales = curvature_scales(records, weights)
    found = [_importance(record, values, scale) for record, scale in zip(records, scales, strict=True)]
    if settings.one_threshold:
        staircases = allocate(found, budget, settings.steps)
    else:
        staircases = [allocate([importance], budget, settings.steps)[0] for importance in found]
    return [
        replace(record, steps=staircase.steps, energy=importance.protected_share(staircase))
        for record, importance, staircase in zip(records, found, staircases, strict=True)
    ]


def least_budget(targets: Sequence[Target], settings: AnalyzeSettings) -> float:
    """The smallest free share that every matrix can be given with the directions kept."""
    one = torch.ones(1)
    shares = []
    for target in targets:
        m, n = target.shape
        outputs = one.expand(m) if settings.basis == "curvature" else None
        kept = kept_directions(m, settings.keep), kept_directions(n, settings.keep)
        shares.append(least_free_share([Importance(m, outputs, one.expand(n), *kept)], settings.steps))
    return max(shares)


def _importance(record: MatrixRecord, values: Mapping[str, Tensor], scale: float) -> Importance:
    def spectrum(side: SideRecord, dim: int) -> Tensor:
        assert side.values is not None
        return whole_spectrum(values[side.values], side.rest, dim)

    assert record.input is not None
    m, n = record.shape
    outputs = None if record.output is None else spectrum(record.output, m)
    stored = 0 if record.output is None else record.output.directions
    return Importance(m, outputs, spectrum(record.input, n), stored, record.input.directions, scale)


def curvature_scales(records: Sequence[MatrixRecord], weights: Sequence[float]) -> list[float]:
    """Curvature of every matrix against the mean over all, added up over sources with their weights."""
    totals = [0.0] * len(records)
    for i, weight in enumerate(weights):
        sizes = [c * g if record.output is not None else c for record in records for c, g in [record.traces[i]]]
        mean = sum(sizes) / len(sizes) or 1.0
        totals = [total + weight * size / mean for total, size in zip(totals, sizes, strict=True)]
    return [total or 1.0 for total in totals]
