"""A model's rules, made of evidence or carried on by it, matrix by matrix into an archive."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from torch import Tensor

from sculptor.analysis.evidence import Source, measure_evidence, plan_passes
from sculptor.analysis.streams import in_streams, num_streams, working_bytes
from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.shards import Shard
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Target
from sculptor.errors import DataError
from sculptor.methods.method import Decides, Derived, Evidence, Measures, Method
from sculptor.methods.settings import AnalyzeSettings
from sculptor.model.load import LoadedModel
from sculptor.progress import Progress
from sculptor.world import ALONE, World


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Measurement:
    """What rules are made of, and how.

    Attributes:
        records: of the matrices, as far as they are known before.
        targets: the same matrices.
        sources: rows to measure on.
        measures: what of them.
        settings: of the analysis.
        make: a method's way from evidence to a rule: new, opened for a task, or carried on.
        task: position in the history that the evidence is of.
        leaves_out: whether matrices that no row reaches are left out; else they are given to `make` without moments.
    """

    records: Mapping[str, MatrixRecord]
    targets: Sequence[Target]
    sources: Sequence[Source]
    measures: Measures
    settings: AnalyzeSettings
    make: Callable[[Evidence], Derived]
    task: int = 0
    leaves_out: bool = False


def write_measured(
    loaded: LoadedModel,
    asked: Measurement,
    writer: ArchiveWriter,
    progress: Progress,
    world: World = ALONE,
) -> list[str]:
    """Measures every matrix that the writer does not have yet, and adds it with its rule; `decide` follows.

    Several processes take some blocks each, all rows of them, and write what they make: the archive is the same, bit for bit.

    Args:
        loaded: an unprotected model.
        asked: what is measured, and made of it.
        writer: takes the rules; that of the first process knows what there is.
        progress: makes progress bars.
        world: the processes that share the work.

    Returns:
        The names of the matrices that were left out, to the first process.

    Raises:
        DataError: if the moments are not finite, or no matrix is reached.
    """
    # Whole blocks: an input that several matrices read may be weighed by the gradients of all of them.
    done = world.from_first({record.name for record in writer.all_records()})
    missing = {target.block for target in asked.targets if target.name not in done}
    todo = [target for target in asked.targets if target.block in missing]
    if not todo:
        return []
    groups, unreached = [todo], list[str]()
    how = asked.sources, asked.measures, asked.settings
    if world.size > 1:
        groups = world.from_first(plan_passes(loaded, todo, *how, world.size))

    def make(evidence: Sequence[Evidence]) -> list[tuple[str, Derived | None]]:
        wanted = [each.name not in done and (each.inputs is not None or not asked.leaves_out) for each in evidence]
        return [(each.name, asked.make(each) if want else None) for each, want in zip(evidence, wanted, strict=True)]

    def derive(group: Sequence[Target]) -> Iterator[tuple[str, Derived | None]]:
        try:
            for measured in measure_evidence(loaded, group, *how, progress, asked.task):
                of_one_input = (list(each) for _, each in itertools.groupby(measured, key=_whose_input))
                for made in in_streams(make, of_one_input, loaded.device, _at_a_time(loaded, asked)):
                    yield from made
        except ValueError as cause:
            raise DataError(f"{loaded.checkpoint.path}: calibration failed ({cause}); look at --data") from cause

    for name, made in write_rules(writer, groups, derive, asked.records, world):
        if not made and name not in done:
            unreached.append(name)
    if unreached and world.first and not writer.all_records():
        raise DataError(f"{loaded.checkpoint.path}: calibration failed (no row reaches any matrix); look at --data")
    return unreached


def _whose_input(evidence: Evidence) -> object:
    """Equal for neighbours that read one input: what a method makes of its moment it makes once."""
    return evidence.name if evidence.inputs is None else evidence.inputs


def _at_a_time(loaded: LoadedModel, asked: Measurement) -> int:
    needed = max(working_bytes(target, moments=True) for target in asked.targets)
    limit = asked.settings.device_memory
    return num_streams(loaded.device, needed, None if limit is None else 1e9 * limit)


def write_rules(
    writer: ArchiveWriter,
    groups: Sequence[Sequence[Target]],
    derive: Callable[[Sequence[Target]], Iterator[tuple[str, Derived | None]]],
    records: Mapping[str, MatrixRecord],
    world: World = ALONE,
) -> Iterator[tuple[str, bool]]:
    """Adds rules to an archive, by several processes in the same shards as by one.

    Args:
        writer: of this process; that of the first takes the shards of all.
        groups: of matrices, whole blocks each; a process works on some of them.
        derive: makes the rules of a group, in its order, None for matrices that get none.
        records: what is known of the matrices.
        world: the processes that share the work.

    Yields:
        To the first process, every matrix in order, and whether it has a rule.
    """
    ends = {target.block: target.name for group in groups for target in group}.values()
    writer.shards.shared |= world.from_first(set(writer.shards.shared))

    def work(group: Sequence[Target]) -> Iterator[tuple[str, bool] | Future[Shard]]:
        for name, derived in derive(group):
            if derived is not None:
                writer.shards.add(records[name], derived)
            if name in ends:
                writer.shards.flush()
            yield name, derived is not None
            yield from writer.shards.hand_over()

    for found in world.in_order(groups, work):
        if isinstance(found, tuple):
            yield found
        else:
            writer.take(found)


def decide(writer: ArchiveWriter, method: Method, weights: Sequence[float]) -> None:
    """Gives every matrix its final rule, now that all are known.

    Args:
        writer: holds all matrices.
        method: decides.
        weights: of the sources of moments so far.
    """
    if not isinstance(method, Decides):
        return
    records = writer.all_records()
    known: dict[str, Tensor] = {}  # shared ones are read once

    def read(i: int, name: str) -> Tensor:
        stored = records[i].tensors[name]
        if stored not in known:
            known[stored] = writer.read(stored)
        return known[stored]

    rules = method.decide([record.rule for record in records], weights, read)
    for record, rule in zip(records, rules, strict=True):
        writer.update(replace(record, rule=rule))
