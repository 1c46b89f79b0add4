"""`sculptor.inspect`: what an archive holds, read lazily."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sculptor.analysis.compare import MatrixComparison, compare_archives
from sculptor.analysis.shares import TaskShare, task_shares
from sculptor.archive.manifest import FrozenMatrices, MatrixRecord, TaskRecord
from sculptor.archive.store import Archive
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.jobs.analyze_report import RoleSummary, summarize_blocks, summarize_roles
from sculptor.methods.kinds import Kinds
from sculptor.methods.method import Terms
from sculptor.methods.rule import num_free
from sculptor.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class MatrixSummary:
    """One matrix of an archive.

    Attributes:
        name: of the tensor; `role` what it is in its block, `index` the number of the block.
        shape: (m, n) = (out, in).
        preserved: protected directions over min(m, n).
        energy: what the protected part holds: of ||W||^2 at analysis, or of the curvature.
        free_share: trainable coordinates over entries.
        added: per task, the directions it added (outputs, inputs), by the task's position in the history.
    """

    name: str
    role: str
    index: int
    shape: tuple[int, int]
    preserved: float
    energy: float
    free_share: float
    added: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
        path: of the archive, of `num_bytes` bytes; `created_by` which version of sculptor.
        model_class: of the model that it is of.
        identity: digest of all tensors and rules, by which records and model cards name the archive.
        base_identity: digest of that checkpoint's matrices.
        tasks: its history, the analysis first.
        roles: its matrices by role, `blocks` by block, `matrices` one by one.
        not_targeted: matrices that it has no rule for, and why.
        rule: kind of rule; `terms` say what things are called, `basis` and `constraint` among them.
        belongs: whether the archive is of the given model; None without one. Never False: that is an error.
        comparison: against another archive; None without one.
        shares: how the tasks share what is protected; empty for an archive without moments.
    """

    path: Path
    created_by: str
    model_class: str
    rule: str
    terms: Terms
    num_bytes: int
    identity: str
    base_identity: str
    tasks: tuple[TaskRecord, ...]
    roles: tuple[RoleSummary, ...]
    blocks: tuple[RoleSummary, ...]
    matrices: tuple[MatrixSummary, ...]
    not_targeted: tuple[FrozenMatrices, ...]
    belongs: bool | None
    comparison: tuple[MatrixComparison, ...] | None
    shares: tuple[TaskShare, ...] = ()

    @property
    def basis(self) -> str:
        """Where the rules come from."""
        return self.terms.basis

    @property
    def constraint(self) -> str:
        """What they forbid."""
        return self.terms.constraint

    @property
    def num_free(self) -> int:
        """Trainable coordinates."""
        return sum(role.num_free for role in self.roles)

    @property
    def num_parameters(self) -> int:
        """Entries of all matrices."""
        return sum(role.num_parameters for role in self.roles)


def inspect(
    archive: str | Path,
    *,
    model: str | Path | None = None,
    compare: str | Path | None = None,
    progress: Progress = silent,
    rules: Kinds | None = None,
) -> Inspection:
    """Summarises an archive; reads its manifest and the tasks' profiles, and no bases unless it is to be compared.

    Args:
        archive: the archive's directory.
        model: a checkpoint it should belong to.
        compare: another archive, compared by principal angles.
        progress: makes progress bars.
        rules: kinds of rules beside sculptor's own.

    Returns:
        Its history, and what is protected and free, by role, block and matrix.

    Raises:
        ArchiveError: if it cannot be read, does not belong to `model`, or shares nothing with `compare`.
    """
    opened = Archive(archive, rules=rules)
    if model is not None:
        opened.check_base(open_checkpoint(model), progress)
    manifest = opened.manifest
    return Inspection(
        path=opened.path,
        created_by=manifest.created_by,
        model_class=manifest.model_class,
        rule=manifest.settings.rule,
        terms=opened.method.terms,
        num_bytes=opened.num_bytes,
        identity=opened.identity,
        base_identity=manifest.base_identity,
        tasks=manifest.tasks,
        roles=summarize_roles(opened),
        blocks=summarize_blocks(opened),
        matrices=tuple(map(_summary, opened.values())),
        not_targeted=manifest.not_targeted,
        belongs=None if model is None else True,
        comparison=None if compare is None else compare_archives(opened, Archive(compare, rules=rules), progress),
        shares=task_shares(opened, progress),
    )


def _summary(record: MatrixRecord) -> MatrixSummary:
    found, (m, n) = record.rule.figures(), record.shape
    return MatrixSummary(
        record.name,
        record.role,
        record.index,
        record.shape,
        found.preserved,
        found.held,
        num_free(record.rule) / (m * n),
        found.added,
    )
