"""What `train` says of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sculptor.archive.manifest import FrozenMatrices
from sculptor.numerics.rounding import ROUNDING_SLACK
from sculptor.training.loop import LoopResult


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """What the run did to one matrix.

    Attributes:
        update: ||dW|| / ||W||.
        leak: ||what its rule forbids of dW|| / ||dW||, measured on the tensor that was written.
        rounding: the leak that rounding alone explains, same unit.
        update_norm: ||dW||, before it was rounded.
        rounding_loss: ||W' - (W + dW)|| / ||dW||: the share of the update that rounding ate.
        outputs_added, inputs_added: directions the archive gained.
        num_free_next: coordinates of the next task.
        frozen: nothing is left free in it.
    """

    role: str
    update: float
    leak: float
    rounding: float
    update_norm: float
    rounding_loss: float
    outputs_added: int
    inputs_added: int
    num_free_next: int
    frozen: bool


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What `train` did; `placement` says where the model's blocks were, and why; `max_harm` is what was allowed.

    `opened` was trained without protection by this run, `also_trained` by this or one before; `scaled` says whether the relative
    rate is one of each matrix's size; `new_tokens` are those that the run added; `classes` those of a classifier;
    `num_measured` rows were measured for the next archive, if any.
    """

    output: Path
    loop: LoopResult
    placement: str
    num_examples: int
    num_dropped: int
    num_cut: int
    num_trainable: int
    num_protected: int
    carry: str
    also_trained: tuple[str, ...]
    opened: tuple[str, ...]
    not_targeted: tuple[FrozenMatrices, ...]
    learning_rate: float | None
    relative_rate: float | None
    scaled: bool
    max_harm: float | None
    matrices: Mapping[str, MatrixReport]
    new_tokens: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    num_measured: int | None = None

    @property
    def max_leak(self) -> float:
        """Of the matrix with the largest."""
        return max((matrix.leak for matrix in self.matrices.values()), default=0.0)

    @property
    def unexplained_leak(self) -> float:
        """What rounding does not explain of the leak, of the matrix with the most: 0 where it explains everything."""
        return max((matrix.leak - ROUNDING_SLACK * matrix.rounding for matrix in self.matrices.values()), default=0.0)

    @property
    def rose(self) -> bool:
        """Whether the training loss ended above where it began."""
        return self.loop.last_loss > self.loop.first_loss

    @property
    def rounding_loss(self) -> float:
        """The share of the whole update that rounding ate, as `verify` weighs matrices."""
        whole = math.hypot(*(matrix.update_norm for matrix in self.matrices.values()))
        lost = math.hypot(*(matrix.rounding_loss * matrix.update_norm for matrix in self.matrices.values()))
        return lost / whole if whole else 0.0

    @property
    def frozen(self) -> tuple[str, ...]:
        """Matrices with no free direction left."""
        return tuple(name for name, matrix in self.matrices.items() if matrix.frozen)
