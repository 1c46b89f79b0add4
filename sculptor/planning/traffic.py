"""What several processes send each other in a step, by arithmetic."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sculptor.methods.rule import Narrowing
from sculptor.planning.matrices import PlannedMatrix
from sculptor.training.stepping.narrowing import narrowed_numbers, narrowed_side


class Beside(NamedTuple):
    """What processes that divide a block exchange beside its parameters, in bytes.

    Attributes:
        gradients: added up at their owners, narrowed where that is less.
        bases: shown to the others, so that they can narrow theirs.
    """

    gradients: float
    bases: float


def beside(block: Mapping[str, float], matrices: Mapping[str, Sequence[PlannedMatrix]], size: int) -> Beside:
    """Of one block.

    Args:
        block: parameter -> bytes of its weight on the device.
        matrices: those that are trained, by parameter.
        size: bytes of a number of a gradient, and of a basis.
    """
    gradients = bases = 0.0
    for name, num_bytes in block.items():
        for matrix in (found := matrices.get(name, ())):
            side = narrowed_side(matrix.rule) if matrix.is_linear else None
            if side is not None:
                assert isinstance(matrix.rule, Narrowing)
                numbers = narrowed_numbers(matrix.rule, side)
                gradients, bases = gradients + size * numbers[0], bases + size * numbers[1]
                break  # it is all of its parameter
        else:
            gradients += num_bytes if found else 0.0
    return Beside(gradients, bases)


def added_up(num_trainable: float, processes: int) -> float:
    """Bytes that each of several processes sends, and gets, in a step: float32 gradients of what all hold, added up in a ring."""
    return 2 * (processes - 1) / processes * 4 * num_trainable


def shown(blocks: Sequence[float], beside: float, micro_batches: int, processes: int, slots: int) -> float:
    """Bytes that a process gets of others in a step, or sends, if the model is divided: blocks twice, what is beside them once.

    Where a pass turns round, at the last block, and at the first one between two micro-batches, as many as there are slots are
    still there.

    Args:
        blocks: bytes of each.
        beside: of gradients, and of bases that are shown, in all.
        micro_batches: of a step.
        processes: how many divide them.
        slots: blocks that a process has on its device at a time.
    """
    moved = micro_batches * (2 * sum(blocks) + beside - sum(blocks[-slots:])) - (micro_batches - 1) * sum(
        blocks[:slots]
    )
    return moved * (processes - 1) / processes
