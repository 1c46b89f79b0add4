"""What a training adds to the passes of streamed blocks: it is told where a pass is, and says what else that takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Ticket


def _unchanged(block: int, slot: Slot) -> list[Ticket] | None:
    """It is as it waits."""
    return None


def _nothing(*_: object) -> None:
    """Nothing is added."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a `BlockStream` calls on its way; these add nothing, which is all that reading a model needs.

    Attributes:
        refill: fills a slot with a block that has changed since it was stored, and says what to wait for; None if it has not.
        block_begun: a backward pass has come to a block: its gradients are about to appear.
        block_done: they have all appeared; its parameters are in the slot.
        beside: of blocks, what else has to be on the device for their backward passes.
        part_tokens: of a batch with more tokens, a block sees so many at a time (or one row, if longer), and so does a
            norm outside of the blocks; None for all at once.
    """

    refill: Callable[[int, Slot], list[Ticket] | None] = _unchanged
    block_begun: Callable[[int], None] = _nothing
    block_done: Callable[[int, Slot], None] = _nothing
    beside: Mapping[int, Sequence[Slots]] = field(default_factory=dict)
    part_tokens: int | None = None
