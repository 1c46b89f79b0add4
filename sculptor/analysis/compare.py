"""How far two archives protect the same directions: principal angles per matrix and side."""

import math
from dataclasses import dataclass

from sculptor.archive.store import Archive, Subspaces
from sculptor.errors import ArchiveError
from sculptor.numerics.bases import Basis, protected_directions
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
    """One matrix in two archives."""

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
    bar = progress(total=len(shared), desc="compare", unit="matrix")
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
    bar.close()
    return tuple(results)


def _protected(found: Subspaces) -> tuple[Basis | None, Basis | None]:
    """The sides of one matrix, as far as its staircase tells their directions apart; more may be stored."""
    if not found.record.has_moments:
        return found.output, found.input
    staircase = found.record.staircase
    counts = staircase.outputs, max(reach for _, reach in staircase.steps)
    sides = zip((found.output, found.input), counts, strict=True)
    output, input = (side and Basis(side.vectors[:, :count], "leading") for side, count in sides)
    return output, input


def _compare(a: Basis | None, b: Basis | None) -> SideComparison:
    sizes = (a.directions if a else 0, b.directions if b else 0)
    if a is None or b is None or 0 in sizes:
        return SideComparison(*sizes, None, None)
    angles = principal_angles(protected_directions(a), protected_directions(b))
    return SideComparison(*sizes, float(angles.cos().square().mean()), math.degrees(float(angles.max())))
