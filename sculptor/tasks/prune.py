"""`sculptor edit prune`: a checkpoint without the weights that matter least."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Target, inspect_architecture
from sculptor.checkpoint.directory import check_modules, published_name, tell_left_behind
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.staging import check_apart, one_pass, write_json
from sculptor.checkpoint.tensors import digest
from sculptor.checkpoint.writer import Edit as Change
from sculptor.checkpoint.writer import edits_of, write_checkpoint
from sculptor.edits.prune import importance_of
from sculptor.edits.prune import prune as prune_matrix
from sculptor.edits.settings import Prune
from sculptor.errors import EditError, SettingsError
from sculptor.jobs.edit_record import archive_facts
from sculptor.jobs.readme import Readme, code, write_readme
from sculptor.jobs.record import record_head
from sculptor.methods.kinds import Kinds
from sculptor.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class PrunedRole:
    """The matrices of one role.

    Attributes:
        role: which.
        num_matrices: how many there are.
        num_parameters: how many weights they have; `num_zero` of them are 0 now.
        norm: ||what was removed|| / ||W||.
        curvature: share of sum h w^2 that was removed; None without curvature.
    """

    role: str
    num_matrices: int
    num_parameters: int
    num_zero: int
    norm: float
    curvature: float | None


@dataclass(frozen=True, slots=True)
class PruneReport:
    """The result of `prune`.

    Attributes:
        output: directory that was written; None of a dry run.
        sparsity: share of every matrix that is 0.
        by: which weights went first: curvature or magnitude.
        roles: the matrices by role; `all` all of them together.
    """

    output: Path | None
    sparsity: float
    by: str
    roles: tuple[PrunedRole, ...]
    all: PrunedRole


@dataclass(slots=True)
class _Sums:
    """Of the matrices of a role."""

    matrices: int = 0
    parameters: int = 0
    zero: int = 0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])  # removed, all
    costs: list[float] = field(default_factory=lambda: [0.0, 0.0])


def prune(
    model: str | Path,
    output: str | Path | None,
    settings: Prune,
    *,
    subspaces: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
    rules: Kinds | None = None,
) -> PruneReport:
    """Writes a checkpoint with a share of every matrix set to 0.

    Args:
        model: checkpoint directory or hub name.
        output: directory to write; None with `dry_run`.
        settings: how much, and which weights first.
        subspaces: archive of the model: its curvature, and which matrices; without it, by magnitude, all of the blocks.
        dry_run: measure what would go, and write nothing.
        overwrite: replace an existing output.
        progress: makes progress bars.
        notice: told, in a line, what looks like weights and does not go along.
        rules: kinds of rules beside sculptor's own.

    Returns:
        What was removed, by role and in all.

    Raises:
        SculptorError: if an input cannot be used, the archive has no curvature, or the output cannot be written.
    """
    if (output is None) != dry_run:
        raise SettingsError(
            "--output is needed" if output is None else "--output without effect: --dry-run writes nothing"
        )
    if subspaces is None and settings.by == "curvature":
        raise SettingsError("--subspaces is needed: curvature comes from an archive; or prune --by magnitude")
    checkpoint = open_checkpoint(model)
    read_record(checkpoint.path)  # refuses a damaged one now
    archive = None if subspaces is None else _open_archive(subspaces, checkpoint, settings, rules, progress)
    targets = inspect_architecture(checkpoint).targets if archive is None else tuple(archive.values())
    job = _Pruning(checkpoint, archive, targets, settings, progress)
    if output is None:
        return job.measure()
    check_modules(checkpoint.path)
    tell_left_behind(checkpoint.path, checkpoint.files, notice)
    output = Path(output).resolve()
    check_apart(output, [checkpoint.path, *([] if archive is None else [archive.path])])
    with one_pass(output, command="edit prune", overwrite=overwrite) as staged:
        return job.write(staged, output)


def _open_archive(
    subspaces: str | Path, checkpoint: Checkpoint, settings: Prune, rules: Kinds | None, progress: Progress
) -> Archive:
    archive = Archive(subspaces, rules=rules)
    lacking = [name for name in archive if settings.by == "curvature" and importance_of(archive.read(name)) is None]
    if lacking:
        raise EditError(
            f"{archive.path}: no curvature of {lacking[0]} (basis {archive.method.terms.basis}); analyze with --basis curvature, "
            "or prune --by magnitude"
        )
    archive.check_base(checkpoint, progress)
    return archive


@dataclass(eq=False)
class _Pruning:
    """The opened inputs, and what was counted."""

    checkpoint: Checkpoint
    archive: Archive | None
    targets: Sequence[Target | MatrixRecord]
    settings: Prune
    progress: Progress
    sums: dict[str, _Sums] = field(default_factory=lambda: defaultdict(_Sums))
    digests: dict[str, str] = field(default_factory=dict)

    def measure(self) -> PruneReport:
        """What would go."""
        with closing(self.progress(total=len(self.targets), desc="measure", unit="matrix")) as bar:
            for target in self.targets:
                self._prune(target, self.checkpoint.matrix(target))
                bar.update(1)
        return self._report(None)

    def write(self, staged: Path, output: Path) -> PruneReport:
        """Checkpoint and record, into a staged directory."""
        with closing(self.progress(total=self.checkpoint.num_bytes, desc="write", unit="B")) as bar:
            write_checkpoint(self.checkpoint, staged, self._changes(), bar=bar)
        report = self._report(output)
        write_json(staged / RECORD_NAME, self._record(report))
        write_readme(staged, self._readme(report))
        return report

    def _changes(self) -> dict[str, Change | Mapping[int, Change]]:
        return edits_of(self.targets, lambda target: partial(self._prune, target))

    def _prune(self, target: Target | MatrixRecord, weight: Tensor) -> Tensor:
        self.checkpoint.check_finite(target, weight)
        by_curvature = self.archive is not None and self.settings.by == "curvature"
        importance = (
            importance_of(self.archive.read(target.name)) if self.archive is not None and by_curvature else None
        )
        pruned = prune_matrix(weight, self.settings.sparsity, importance)
        squares = weight.to(torch.float64).square()
        gone = pruned == 0
        sums = self.sums[target.role]
        sums.matrices += 1
        sums.parameters += weight.numel()
        sums.zero += int(gone.sum())
        costs = squares if importance is None else squares * importance
        for found, values in ((sums.squares, squares), (sums.costs, costs)):
            found[0] += float(values[gone].sum())
            found[1] += float(values.sum())
        self.digests[target.name] = digest(weight)
        return pruned

    def _report(self, output: Path | None) -> PruneReport:
        roles = tuple(self._sum(role, [sums]) for role, sums in self.sums.items())
        total = self._sum("all", list(self.sums.values()))
        return PruneReport(output, self.settings.sparsity, self.settings.by, roles, total)

    def _sum(self, name: str, found: Sequence[_Sums]) -> PrunedRole:
        removed, whole = (sum(sums.squares[i] for sums in found) for i in (0, 1))
        cost, costs = (sum(sums.costs[i] for sums in found) for i in (0, 1))
        return PrunedRole(
            name,
            sum(sums.matrices for sums in found),
            sum(sums.parameters for sums in found),
            sum(sums.zero for sums in found),
            (removed / (whole or 1.0)) ** 0.5,
            cost / (costs or 1.0) if self.settings.by == "curvature" else None,
        )

    def _record(self, report: PruneReport) -> dict[str, Any]:
        before = read_record(self.checkpoint.path)
        return {
            **record_head("edit prune"),
            "settings": asdict(self.settings),
            "method": "EsaCL-style" if self.settings.by == "curvature" else "magnitude",
            "base": {"name": published_name(self.checkpoint.path), "identity": identity(self.digests)},
            **({} if self.archive is None else {"archive": archive_facts(self.archive)}),
            "lineage": list(map(asdict, before.lineage)),
            "also_trained": list(before.also_trained),
            "roles": [asdict(role) for role in (*report.roles, report.all)],
        }

    def _readme(self, report: PruneReport) -> Readme:
        found = report.all
        by = "magnitude" if report.by == "magnitude" else "the curvature of a subspace archive"
        curvature = [] if found.curvature is None else [("removed of the curvature", f"{100 * found.curvature:.2f} %")]
        return Readme(
            bases=(self.checkpoint.path,),
            done=f"{100 * report.sparsity:.0f} % pruned",
            summary=f"{code(published_name(self.checkpoint.path))} with the weights set to 0 that matter least, by {by}.",
            tags=("pruning", "sparse"),
            figures=[
                (
                    "weights that are 0",
                    f"{found.num_zero:,} of {found.num_parameters:,}, in {found.num_matrices} matrices",
                ),
                ("removed of the norm", f"{100 * found.norm:.2f} %"),
                *curvature,
            ],
        )
