"""How tasks share what an archive protects, as far as its rules know: means over all matrices."""

from contextlib import closing
from dataclasses import dataclass

import torch

from sculptor.archive.store import Archive
from sculptor.methods.rule import Directed
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
    """Per task; empty for an archive that does not know."""
    tasks = archive.manifest.tasks
    weights = torch.tensor([float(sum(task.weights)) for task in tasks], dtype=torch.float64)
    protected = torch.zeros(len(tasks), dtype=torch.float64)
    own = torch.zeros(len(tasks), dtype=torch.float64)
    overlaps = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    count = 0
    with closing(progress(total=len(archive), desc="tasks", unit="matrix")) as bar:
        for name in archive:
            entry = archive.read(name)
            found = entry.rule.shares(entry.tensors) if isinstance(entry.rule, Directed) else None
            bar.update(1)
            # Tasks that left the archive as it was have no profile.
            if found is None or found.held.numel() != len(tasks):
                continue
            count += 1
            protected += found.held
            own += weights * found.held / (weights * found.held).sum().clamp_min(torch.finfo(torch.float64).tiny)
            overlaps += found.overlaps
    if not count:
        return ()
    return tuple(
        TaskShare(task.name, float(protected[i]) / count, float(own[i]) / count, tuple((overlaps[i] / count).tolist()))
        for i, task in enumerate(tasks)
    )
