"""How an archive goes on after a task.

`accumulate`: bases only grow. The leading singular vectors of dW are appended, the fewest that hold 95 % of
||dW||^2, at most a quarter of the directions still free, and never the last free one: a matrix whose task needs
that one is frozen from then on. `retake`: the weights are decomposed again (the paper), which forgets what lies in
small singular directions.
"""

from dataclasses import dataclass

from torch import Tensor

from sculptor.analysis.weights import MatrixSubspaces, analyze_matrix
from sculptor.archive.manifest import ArchiveConstraint, MatrixRecord
from sculptor.archive.store import Subspaces
from sculptor.numerics.bases import Basis, extend
from sculptor.numerics.linalg import singular_subspaces
from sculptor.numerics.staircase import Constraint, Staircase

ENERGY_SHARE = 0.95
FREE_SHARE = 0.25


@dataclass(frozen=True, eq=False, slots=True)
class CarriedSubspaces:
    """The next archive's entry for one matrix: its sides, and how many directions the task added to each."""

    staircase: Staircase
    output: Basis | None
    input: Basis | None
    outputs_added: int
    inputs_added: int


def accumulate(subspaces: Subspaces, update: Tensor, constraint: Constraint) -> CarriedSubspaces:
    """Appends what a task learned to the bases of one matrix.

    Args:
        subspaces: the bases the task was trained with.
        update: dW (m, n) before rounding.
        constraint: the archive's.
    """
    record = subspaces.record
    m, n = record.shape
    unchanged = CarriedSubspaces(record.staircase, subspaces.output, subspaces.input, 0, 0)
    if record.staircase.num_free == 0 or not bool(update.any()):
        return unchanged
    outputs = subspaces.output.directions if subspaces.output else 0
    inputs = subspaces.input.directions if subspaces.input else 0
    allowed = most_added(record.shape, outputs, inputs, constraint)
    if allowed <= 0:
        return CarriedSubspaces(Staircase.closed(m, n), subspaces.output, subspaces.input, 0, 0)
    found = singular_subspaces(update, min(allowed, m, n))
    count = min(allowed, num_leading(found.values))
    output = None if constraint == "input" else extend(subspaces.output, found.left[:, :count], single_cut=True)
    input = extend(subspaces.input, found.right[:, :count], single_cut=True)
    new_outputs, new_inputs = (side.directions if side else 0 for side in (output, input))
    staircase = Staircase.of(constraint, m, n, new_outputs, new_inputs)
    return CarriedSubspaces(staircase, output, input, new_outputs - outputs, new_inputs - inputs)


def most_added(shape: tuple[int, int], outputs: int, inputs: int, constraint: ArchiveConstraint) -> int:
    """How many directions a task may add to a matrix (m, n), given those that are protected."""
    m, n = shape
    free = n - inputs if constraint == "input" else min(m - outputs, n - inputs)
    return min(max(1, int(FREE_SHARE * free)), free - 1)


def num_leading(values: Tensor) -> int:
    """The fewest leading singular values that hold 95 % of the squared norm."""
    squares = values.square()
    return int((squares.cumsum(0) < ENERGY_SHARE * squares.sum()).sum()) + 1


def retake(record: MatrixRecord, weight: Tensor, constraint: Constraint) -> MatrixSubspaces:
    """Decomposes the new weight (m, n), protecting as many directions as the analysis did."""
    first = record.added[0]
    return analyze_matrix(weight, constraint, max(first.outputs, first.inputs))
