"""A model's rules, made of evidence or carried on by it, matrix by matrix into an archive."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from sculptor.analysis.evidence import Source, measure_evidence
from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Target
from sculptor.errors import DataError
from sculptor.methods.method import Decides, Derived, Evidence, Measures, Method
from sculptor.methods.settings import AnalyzeSettings
from sculptor.model.load import LoadedModel
from sculptor.progress import Progress


def write_measured(
    loaded: LoadedModel,
    records: Mapping[str, MatrixRecord],
    targets: Sequence[Target],
    sources: Sequence[Source],
    measures: Measures,
    settings: AnalyzeSettings,
    make: Callable[[Evidence], Derived],
    writer: ArchiveWriter,
    progress: Progress,
    task: int = 0,
    *,
    unreached: list[str] | None = None,
) -> None:
    """Measures every matrix that the writer does not have yet, and adds it with its rule; `decide` follows.

    Args:
        loaded: an unprotected model.
        records: of the matrices, as far as they are known before.
        targets: the same matrices.
        sources: rows to measure on.
        measures: what of them.
        settings: of the analysis.
        make: a method's way from evidence to a rule: new, opened for a task, or carried on.
        writer: takes the rules.
        progress: makes progress bars.
        task: position in the history that the evidence is of.
        unreached: takes the names of matrices that no row reaches, which are then left out; without it they are given to
            `make` without moments.

    Raises:
        DataError: if the moments are not finite, or no matrix is reached.
    """
    # Whole blocks: an input that several matrices read may be weighed by the gradients of all of them.
    done = {record.name for record in writer.all_records()}
    missing = {target.block for target in targets if target.name not in done}
    todo = [target for target in targets if target.block in missing]
    if not todo:
        return
    ends = {target.block: target.name for target in todo}.values()
    try:
        for evidence in measure_evidence(loaded, todo, sources, measures, settings, progress, task):
            if evidence.inputs is None and unreached is not None:
                unreached.append(evidence.name)
            elif evidence.name not in done:
                writer.add(records[evidence.name], make(evidence))
            if evidence.name in ends:
                writer.flush()
    except ValueError as cause:
        raise DataError(f"{loaded.checkpoint.path}: calibration failed ({cause}); look at --data") from cause
    if unreached and not writer.all_records():
        raise DataError(f"{loaded.checkpoint.path}: calibration failed (no row reaches any matrix); look at --data")


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
