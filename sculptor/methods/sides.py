"""The sides of a matrix as rules note them: which directions are stored, in which form, and what each task added."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sculptor.methods.rule import Tensors
from sculptor.numerics.bases import Basis, Form
from sculptor.numerics.reflectors import Columns, CompleteBasis, FreeSide, is_written_out
from sculptor.validation import STRICT, Count, NotNegative


@dataclass(frozen=True, slots=True)
class Side:
    """One stored side of a matrix.

    Attributes:
        form: whether its tensor holds the protected directions or their complement.
        directions: how many are protected, or told apart by the staircase.
        rest: mean eigenvalue of all other directions, where eigenvalues are stored.
    """

    __pydantic_config__ = STRICT

    form: Form
    directions: Count
    rest: NotNegative = 0.0

    def columns(self, dim: int) -> int:
        """How many columns its tensor has."""
        return self.directions if self.form == "leading" else dim - self.directions

    def restored(self, name: str, tensors: Tensors, dim: int) -> FreeSide:
        """The completed side, of what `named_tensors` gave."""
        if f"{name}_columns" in tensors:
            return Columns(tensors[f"{name}_columns"])
        shift = self.columns(dim) if self.form == "free" else 0
        return CompleteBasis(tensors[f"{name}_reflectors"], tensors[f"{name}_triangle"], shift)

    def completed(self, name: str, dim: int, first: int) -> "Completed":
        """What `free_side` and `named_tensors` make of it, from the first free direction on."""
        c, free = self.columns(dim), dim - first
        if is_written_out(self.form, c, dim, first):
            return Completed({f"{name}_columns": (dim, free)}, dim * free)
        return Completed({f"{name}_reflectors": (dim, c), f"{name}_triangle": (c, c)}, c * (dim + c + free))


class Completed(NamedTuple):
    """A side as training has it: its tensors' shapes by name, and multiplications to turn one vector; none of the identity."""

    shapes: Mapping[str, tuple[int, ...]]
    turn: int


@dataclass(frozen=True, slots=True)
class Added:
    """Directions that one task added to a matrix, after those that were there."""

    __pydantic_config__ = STRICT

    task: Count
    outputs: Count
    inputs: Count


def side_of(basis: Basis | None) -> Side | None:
    """What is noted of a stored basis."""
    return None if basis is None else Side(basis.form, basis.directions)
