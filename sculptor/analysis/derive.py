"""A model's rules, made of evidence or carried on by it, matrix by matrix into an archive."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sculptor.analysis.evidence import Source, measure_evidence, plan_passes
from sculptor.archive.manifest import MatrixRecord
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
    writer: ArchiveWriter | None,
    progress: Progress,
    world: World = ALONE,
) -> list[str]:
    """Measures every matrix that the writer does not have yet, and adds it with its rule; `decide` follows.

    Several processes take some blocks each, all rows of them: the archive is the same, bit for bit.

    Args:
        loaded: an unprotected model.
        asked: what is measured, and made of it.
        writer: takes the rules; the first process has it.
        progress: makes progress bars.
        world: the processes that share the work.

    Returns:
        The names of the matrices that were left out, to the first process.

    Raises:
        DataError: if the moments are not finite, or no matrix is reached.
    """
    # Whole blocks: an input that several matrices read may be weighed by the gradients of all of them.
    done = world.from_first({record.name for record in writer.all_records()} if writer is not None else set())
    missing = {target.block for target in asked.targets if target.name not in done}
    todo = [target for target in asked.targets if target.block in missing]
    if not todo:
        return []
    ends = {target.block: target.name for target in todo}.values()
    groups, packing, unreached = [todo], Packing(), list[str]()
    how = asked.sources, asked.measures, asked.settings
    if world.size > 1:
        groups = world.from_first(plan_passes(loaded, todo, *how, world.size))

    def derive(group: Sequence[Target]) -> Iterator[tuple[str, Derived | None]]:
        try:
            for evidence in measure_evidence(loaded, group, *how, progress, asked.task):
                left_out = evidence.name in done or (evidence.inputs is None and asked.leaves_out)
                derived = None if left_out else asked.make(evidence)
                if derived is not None and world.size > 1:
                    derived = packing.pack(asked.records[evidence.name], derived)
                yield evidence.name, derived
        except ValueError as cause:
            raise DataError(f"{loaded.checkpoint.path}: calibration failed ({cause}); look at --data") from cause

    for name, derived in world.in_order(groups, derive):
        assert writer is not None
        if derived is not None:
            writer.add(asked.records[name], derived)
        elif name not in done:
            unreached.append(name)
        if name in ends:
            writer.flush()
    if unreached and writer is not None and not writer.all_records():
        raise DataError(f"{loaded.checkpoint.path}: calibration failed (no row reaches any matrix); look at --data")
    return unreached


class Packing:
    """Makes rules ready to travel from one process to the first: in host memory, and what matrices share only once."""

    def __init__(self) -> None:
        self._sent: set[tuple[str, str]] = set()

    def pack(self, record: MatrixRecord, derived: Derived) -> Derived:
        """The same rule; tensors that went before, which the writer has by then, are empty."""
        tensors = {}
        for name, tensor in derived.tensors.items():
            key = (record.input_group, name)
            tensors[name] = torch.empty(0) if key in self._sent else tensor.cpu()
            if name in derived.shared:
                self._sent.add(key)
        return replace(derived, tensors=tensors)


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
