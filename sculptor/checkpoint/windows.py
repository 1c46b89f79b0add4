"""Where in a parameter of the model a matrix is: all of it, or one of several that are stacked, as experts are."""

from dataclasses import dataclass

from torch import Tensor

from sculptor.validation import STRICT, Count


@dataclass(frozen=True, slots=True)
class Window:
    """A matrix in a parameter.

    Attributes:
        part: which slice of the first dimension, None for all of the parameter.
        rows: the first of the slice's rows and one past the last, None for all of them.
    """

    __pydantic_config__ = STRICT

    part: Count | None = None
    rows: tuple[Count, Count] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is the matrix."""
        return self.part is None

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix, as a view of the parameter."""
        found = tensor if self.part is None else tensor[self.part]
        return found if self.rows is None else found[self.rows[0] : self.rows[1]]

    def outputs(self, rows: Tensor) -> Tensor:
        """What the matrix wrote (t, m), of what its slice did."""
        return rows if self.rows is None else rows[:, self.rows[0] : self.rows[1]]

    def shape(self, slice_shape: tuple[int, int]) -> tuple[int, int]:
        """(m, n) of the matrix, in a slice of some (m, n)."""
        return slice_shape if self.rows is None else (self.rows[1] - self.rows[0], slice_shape[1])


WHOLE = Window()
