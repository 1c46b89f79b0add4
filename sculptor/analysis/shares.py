"""How tasks share what an archive protects, from the profiles that each left behind.

A task's profile on a side is its part of the moment on each of the 64 leading directions, and on all others together;
with g and c its shares on output and input directions, it has  P = sum over frozen pairs of g_i c_j  of its own
curvature protected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.store import Archive
from sculptor.numerics.moments import spread_profile
from sculptor.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class TaskShare:
    """One entry of the archive's history.

    Attributes:
        name: of the task; the analysis is the first.
        protected: share of its own curvature in frozen pairs.
        own: share of all protected curvature that is its own; over all tasks 1.
        overlaps: with every task of the history, by cosine: 1 for the same directions, 0 for none in common.
    """

    name: str
    protected: float
    own: float
    overlaps: tuple[float, ...]


def task_shares(archive: Archive, progress: Progress = silent) -> tuple[TaskShare, ...]:
    """Per task, means over all matrices; empty for an archive without moments."""
    tasks = archive.manifest.tasks
    records = [record for record in archive.values() if record.has_moments]
    if not records:
        return ()
    weights = torch.tensor([float(sum(task.details.get("weights", ()))) for task in tasks], dtype=torch.float64)
    protected = torch.zeros(len(tasks), dtype=torch.float64)
    own = torch.zeros(len(tasks), dtype=torch.float64)
    overlaps = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    bar = progress(total=len(records), desc="tasks", unit="matrix")
    for record in records:
        outputs, inputs = _spreads(archive, record)
        held = _held(record, outputs, inputs)
        protected += held
        own += weights * held / (weights * held).sum().clamp_min(torch.finfo(torch.float64).tiny)
        overlaps += _cosines(inputs) * (1.0 if outputs is None else _cosines(outputs))
        bar.update(1)
    bar.close()
    count = len(records)
    return tuple(
        TaskShare(task.name, float(protected[i]) / count, float(own[i]) / count, tuple((overlaps[i] / count).tolist()))
        for i, task in enumerate(tasks)
    )


def _spreads(archive: Archive, record: MatrixRecord) -> tuple[Tensor | None, Tensor]:
    """Each task's share per direction: (tasks, m) or None, and (tasks, n)."""
    m, n = record.shape
    outputs, inputs = archive.profiles(record.output), archive.profiles(record.input)
    assert inputs is not None
    of_inputs = torch.stack([spread_profile(row, n) for row in inputs])
    return None if outputs is None else torch.stack([spread_profile(row, m) for row in outputs]), of_inputs


def _held(record: MatrixRecord, outputs: Tensor | None, inputs: Tensor) -> Tensor:
    """Share of every task's curvature in the frozen pairs: (tasks,)."""
    m = record.shape[0]
    held = torch.zeros(inputs.shape[0], dtype=torch.float64)
    for start, stop, reach in record.staircase.groups:
        rows = (stop - start) / m if outputs is None else outputs[:, start:stop].sum(dim=1)
        held += rows * inputs[:, :reach].sum(dim=1)
    return held


def _cosines(rows: Tensor) -> Tensor:
    """(tasks, tasks)."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    return unit @ unit.T
