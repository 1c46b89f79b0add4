"""Device memory that is filled again and again, and knows when it may be."""

from collections.abc import Callable
from functools import partial

import torch

from sculptor.streaming.regions import Region
from sculptor.streaming.transfers import DONE, Ticket, Transfers


class Slot:
    """Device memory for one block's worth of something.

    Attributes:
        memory: bytes.
        holds: index of the block whose it is, or is about to be.
        ready: what to wait for before it is read.
        uses: what has to be over before it is filled again, the last of each lane.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.ready: list[Ticket] = [DONE]
        self.uses: dict[str, Ticket] = {}

    def wait(self) -> None:
        """The current stream goes on when it is ready."""
        for ticket in self.ready:
            ticket.wait()

    def taken(self) -> list[Ticket]:
        """What has to be over before it is filled, which is the caller's to wait for now."""
        uses, self.uses = list(self.uses.values()), {}
        return uses


# Starts to fill a slot with a block, and says what to wait for before reading it.
Fill = Callable[[int, Slot], list[Ticket]]


class Slots:
    """A few slots, by block. The one entered last is not filled with another block as long as there is another slot.

    Args:
        count: of slots; with more than one, what comes next can be fetched ahead.
        num_bytes: of each.
        device: where they are.
        fill: fills one.

    Attributes:
        fills: how often each block was put into a slot.
        most: how many slots held a block at a time.
    """

    def __init__(self, count: int, num_bytes: int, device: torch.device, fill: Fill) -> None:
        self._slots = [Slot(num_bytes, device) for _ in range(count)]
        self._fill = fill
        self._current: Slot | None = None
        self.fills: dict[int, int] = {}
        self.most = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return sum(slot.memory.numel() for slot in self._slots)

    def find(self, block: int) -> Slot | None:
        """The slot that holds a block, if one does."""
        return next((slot for slot in self._slots if slot.holds == block), None)

    def fetch(self, block: int) -> Slot:
        """The slot that holds a block, or will."""
        found = self.find(block)
        if found is not None:
            return found
        slot = next((slot for slot in self._slots if slot is not self._current), self._slots[0])
        slot.holds = None  # should filling fail
        slot.ready = self._fill(block, slot)
        slot.holds = block
        self.fills[block] = self.fills.get(block, 0) + 1
        self.most = max(self.most, sum(slot.holds is not None for slot in self._slots))
        return slot

    def fetch_ahead(self, block: int) -> None:
        """Starts to fetch a block, if that does not displace the current one."""
        if len(self._slots) > 1:
            self.fetch(block)

    def enter(self, block: int) -> Slot:
        """The slot of a block, ready for the current stream."""
        slot = self.fetch(block)
        self._current = slot
        slot.wait()
        return slot

    def forget(self, block: int) -> None:
        """What is held of a block is not what it should be any more."""
        slot = self.find(block)
        if slot is not None:
            slot.holds = None

    def close(self) -> None:
        """Gives the memory back."""
        self._slots.clear()
        self._current = None


def loading(transfers: Transfers, region_of: Callable[[int], Region | None]) -> Fill:
    """Fills slots with what waits in the regions of blocks; where nothing waits, the slot is only made free."""

    def fill(block: int, slot: Slot) -> list[Ticket]:
        region, uses = region_of(block), slot.taken()
        if region is None:
            return uses
        job = partial(region.load, slot.memory[: region.num_bytes], 0)
        return [transfers.load(job, [*uses, region.written])]

    return fill
