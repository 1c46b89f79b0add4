"""How far two archives protect the same directions: principal angles per matrix and side."""

import math
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from sculptor.archive.store import Archive, Entry
from sculptor.errors import ArchiveError
from sculptor.methods.rule import Directed
from sculptor.numerics.linalg import principal_angles
from sculptor.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class SideComparison:
    """Two protected subspaces of one side.

    Attributes:
        first, second: their dimensions.
        overlap: mean squared cosine of the principal angles, 1 where the smaller lies in the larger.
        largest_angle: in degrees; None if one of them is empty.
    """

    first: int
    second: int
    overlap: float | None
    largest_angle: float | None


@dataclass(frozen=True, slots=True)
class MatrixComparison:
    """One matrix in two archives.

    Attributes:
        name: of the matrix; `role` what it is in its block.
        output, input: its protected output and input directions.
    """

    name: str
    role: str
    output: SideComparison
    input: SideComparison


def compare_archives(first: Archive, second: Archive, progress: Progress = silent) -> tuple[MatrixComparison, ...]:
    """Compares every matrix that both archives hold.

    Raises:
        ArchiveError: if they share no matrix, or one has different shapes.
    """
    shared = [name for name in first if name in second]
    if not shared:
        raise ArchiveError(f"{first.path} and {second.path} share no matrix; they are of different models")
    results = []
    with closing(progress(total=len(shared), desc="compare", unit="matrix")) as bar:
        for name in shared:
            if first[name].shape != second[name].shape:
                raise ArchiveError(
                    f"{name} is {list(first[name].shape)} in {first.path} and {list(second[name].shape)} in {second.path}"
                )
            (a_output, a_input), (b_output, b_input) = _protected(first.read(name)), _protected(second.read(name))
            results.append(
                MatrixComparison(name, first[name].role, _compare(a_output, b_output), _compare(a_input, b_input))
            )
            bar.update(1)
    return tuple(results)


def _protected(entry: Entry) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(entry.rule, Directed):
        raise ArchiveError(f"{entry.record.name}: a rule of kind {entry.rule.kind} has no directions to compare")
    return entry.rule.directions(entry.tensors)


def _compare(a: Tensor | None, b: Tensor | None) -> SideComparison:
    sizes = (0 if a is None else a.shape[1], 0 if b is None else b.shape[1])
    if a is None or b is None or 0 in sizes:
        return SideComparison(*sizes, None, None)
    angles = principal_angles(a, b)
    return SideComparison(*sizes, float(angles.cos().square().mean()), math.degrees(float(angles.max())))
