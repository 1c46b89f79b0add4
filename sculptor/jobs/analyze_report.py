"""What an archive holds, by role, and what `analyze` says of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sculptor.archive.manifest import FrozenMatrices, MatrixRecord, SourceFacts
from sculptor.archive.store import Archive
from sculptor.checkpoint.reader import Checkpoint
from sculptor.methods.method import Terms
from sculptor.methods.rule import Rule, num_free


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """All matrices of one role, or of one block.

    Attributes:
        role: which; of a block, its path in the names of tensors.
        num_matrices: how many there are.
        preserved: mean share of protected directions.
        energy: mean share of ||W||^2, or of the curvature, in them.
        num_free: trainable coordinates; `num_parameters` entries of the matrices.
    """

    role: str
    num_matrices: int
    preserved: float
    energy: float
    num_free: int
    num_parameters: int


@dataclass(frozen=True, slots=True)
class AnalyzeReport:
    """What `analyze` did.

    Attributes:
        output: directory of the archive.
        terms: what things are called; `basis` and `constraint` are among them.
        roles: its matrices by role, in the order of the model.
        archive_bytes: size of the archive's shards and sections; `checkpoint_bytes` that of the tensors of the model.
        not_targeted: matrices that it has no rule for, and why.
        calibration: rows and tokens of every source.
        most_directions: the most that is stored of a side of a matrix, where it was calibrated.
        budget: share of pairs that was asked to be left free, where one was.
    """

    output: Path
    terms: Terms
    roles: tuple[RoleSummary, ...]
    archive_bytes: int
    checkpoint_bytes: int
    not_targeted: tuple[FrozenMatrices, ...] = ()
    calibration: tuple[SourceFacts, ...] = ()
    most_directions: int = 0
    budget: float | None = None

    @property
    def free_share(self) -> float:
        """Share of pairs that is free."""
        return sum(role.num_free for role in self.roles) / sum(role.num_parameters for role in self.roles)

    @property
    def basis(self) -> str:
        """Where the rules come from."""
        return self.terms.basis

    @property
    def constraint(self) -> str:
        """What they forbid."""
        return self.terms.constraint

    @property
    def num_matrices(self) -> int:
        """Matrices in the archive."""
        return sum(role.num_matrices for role in self.roles)


def report_of(archive: Archive, checkpoint: Checkpoint) -> AnalyzeReport:
    """The table of an archive, per role in the order of the model."""
    manifest = archive.manifest
    bases = [
        record.tensors[name] for record in archive.values() for name in record.rule.orthonormal & record.tensors.keys()
    ]
    return AnalyzeReport(
        output=archive.path,
        terms=archive.method.terms,
        roles=summarize_roles(archive),
        archive_bytes=archive.num_bytes,
        checkpoint_bytes=checkpoint.num_bytes,
        not_targeted=manifest.not_targeted,
        calibration=manifest.tasks[0].calibration,
        most_directions=max((manifest.tensors[name].shape[1] for name in bases), default=0)
        if manifest.source_weights
        else 0,
        budget=archive.method.terms.budget,
    )


def summarize_roles(archive: Archive) -> tuple[RoleSummary, ...]:
    """Per role in the order of the model."""
    return _summarize(archive, lambda record: record.role)


def summarize_blocks(archive: Archive) -> tuple[RoleSummary, ...]:
    """Per block in the order of the model."""
    return _summarize(archive, lambda record: block_of(record.name, record.role))


def block_of(name: str, role: str) -> str:
    """Path of the block that a matrix is in: its name as far as the first number, for all blocks are numbered."""
    found = re.match(r"(.*?\b\d+)\.", name)
    return found[1] if found else role


def _summarize(archive: Archive, key: Callable[[MatrixRecord], str]) -> tuple[RoleSummary, ...]:
    by_role: dict[str, list[Rule]] = {}
    for record in archive.values():
        by_role.setdefault(key(record), []).append(record.rule)
    return tuple(
        RoleSummary(
            role,
            len(rules),
            preserved=sum(rule.figures().preserved for rule in rules) / len(rules),
            energy=sum(rule.figures().held for rule in rules) / len(rules),
            num_free=sum(map(num_free, rules)),
            num_parameters=sum(rule.shape[0] * rule.shape[1] for rule in rules),
        )
        for role, rules in by_role.items()
    )
