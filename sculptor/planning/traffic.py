"""What several processes send each other in a step, by arithmetic."""

from collections.abc import Sequence


def added_up(num_trainable: float, processes: int) -> float:
    """Bytes that each of several processes sends, and gets, in a step: float32 gradients of what all hold, added up in a ring."""
    return 2 * (processes - 1) / processes * 4 * num_trainable


def shown(blocks: Sequence[float], trained: float, micro_batches: int, processes: int) -> float:
    """Bytes that a process gets of others in a step, or sends, if the model is divided: blocks twice, full-size gradients once.

    Where a pass turns round, at the last block, and at the first one between two micro-batches, a block is still there.

    Args:
        blocks: bytes of each, of which `trained` in all belong to matrices that are.
        micro_batches: of a step.
        processes: how many divide them.
    """
    moved = micro_batches * (2 * sum(blocks) + trained - blocks[-1]) - (micro_batches - 1) * blocks[0]
    return moved * (processes - 1) / processes
