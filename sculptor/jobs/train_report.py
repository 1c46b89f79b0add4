"""What `train` says of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sculptor.analysis.verify import Verification
from sculptor.archive.manifest import FrozenMatrices
from sculptor.numerics.rounding import ROUNDING_SLACK
from sculptor.training.loop import LoopResult

_SOME = 0.1  # of an update that may be lost to rounding without a word


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """What the run did to one matrix.

    Attributes:
        role: what it is in its block.
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
    """What `train` did.

    Attributes:
        output: directory of the merged checkpoint.
        loop: steps, losses, harm.
        placement: where the model's blocks were, and why.
        num_examples: rows trained on; `num_dropped` did not fit, `num_cut` lost a part of their prompt, or text.
        num_trainable: coordinates; `num_protected` entries' worth of the same matrices that may not change.
        carry: how the archive went on.
        also_trained: names of tensors that were trained without protection, by this run or one before; `opened` by this one.
        not_targeted: matrices that the archive has no rule for, and why.
        learning_rate: the absolute peak, if one was given; else None, and `relative_rate` is of each matrix's size (`scaled`),
            or of no unit.
        max_harm: what was allowed, in nats a token; None without a limit.
        matrices: name -> what became of it.
        new_tokens: that the run added.
        classes: of a classifier.
        num_measured: rows that were measured for the next archive, if any.
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
    matrices: Mapping[str, MatrixReport] = field(repr=False)
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


def written_line(step: int, report: TrainReport, found: Verification) -> str:
    """What the callback of a trainer says of an output that it has verified."""
    if not any(matrix.update_norm for matrix in report.matrices.values()):
        return (
            f"step {step}: wrote {report.output}, in which no matrix has changed: nothing was trained; make the optimizer after "
            "sculptor.protect, and look at its learning rate"
        )
    harm = report.loop.harm
    said = "" if harm is None else f"; harm {harm.nats:.2g} ± {harm.error:.1g} nats a token"
    lost = f"; rounding removed {report.rounding_loss:.0%} of the update, save_dtype='float32' keeps it"
    return (
        f"step {step}: wrote {report.output}, verified: leak {found.leak:.1e} of the update into what is protected, rounding "
        f"explains {found.rounding:.1e}{said}{lost if report.rounding_loss > _SOME else ''}"
    )
