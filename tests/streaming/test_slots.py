"""Which block is in which slot, and how often it was brought there."""

import pytest
import torch

from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Ticket

CPU = torch.device("cpu")


class Noted(Ticket):
    """Counts how often it was waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def wait(self) -> None:
        self.count += 1


class Source:
    """Fills slots with the number of the block, and keeps what was filled in which order."""

    def __init__(self, count: int) -> None:
        self.filled: list[int] = []
        self.tickets: list[Noted] = []
        self.broken: int | None = None
        self.slots = Slots(count, 4, CPU, self.fill)

    def fill(self, block: int, slot: Slot) -> list[Ticket]:
        if block == self.broken:
            raise OSError("the disk is gone")
        slot.memory.fill_(block)
        self.filled.append(block)
        self.tickets.append(Noted())
        return [self.tickets[-1]]


def test_a_block_that_is_there_is_not_filled_again() -> None:
    source = Source(2)
    first = source.slots.enter(3)
    assert first.memory.tolist() == [3] * 4
    assert source.slots.enter(3) is source.slots.fetch(3) is source.slots.find(3) is first
    assert source.slots.find(4) is None
    assert source.filled == [3]
    assert source.slots.fills == {3: 1}


def test_the_current_block_is_not_displaced_where_there_are_two_slots() -> None:
    source = Source(2)
    current = source.slots.enter(0)
    for block in (1, 2, 3, 1):
        source.slots.fetch_ahead(block)
        assert source.slots.find(0) is current
        assert current.memory.tolist() == [0] * 4
        found = source.slots.find(block)
        assert found is not None
        assert found.memory.tolist() == [block] * 4
    assert source.slots.fills == {0: 1, 1: 2, 2: 1, 3: 1}
    assert source.slots.most == 2


def test_walking_with_two_slots_fills_each_block_once_there_and_but_for_the_last_two_once_back() -> None:
    source, count = Source(2), 5
    for block in range(count):
        source.slots.enter(block)
        if block + 1 < count:
            source.slots.fetch_ahead(block + 1)
    assert source.filled == [0, 1, 2, 3, 4]
    for block in reversed(range(count)):
        source.slots.enter(block)
        if block:
            source.slots.fetch_ahead(block - 1)
    assert source.filled == [0, 1, 2, 3, 4, 2, 1, 0]


def test_with_one_slot_nothing_is_fetched_ahead() -> None:
    source = Source(1)
    source.slots.enter(0)
    source.slots.fetch_ahead(1)
    assert source.filled == [0]
    slot = source.slots.enter(1)
    assert source.slots.find(0) is None
    assert slot.holds == 1
    assert source.slots.most == 1


def test_a_forgotten_block_is_filled_again() -> None:
    source = Source(2)
    source.slots.enter(0)
    source.slots.fetch(1)
    source.slots.forget(0)
    source.slots.forget(7)  # was never there
    assert source.slots.find(0) is None
    assert source.slots.find(1) is not None
    source.slots.enter(0)
    assert source.filled == [0, 1, 0]
    assert source.slots.fills == {0: 2, 1: 1}


def test_a_block_that_could_not_be_brought_is_not_there() -> None:
    source = Source(1)
    source.slots.enter(0)
    source.broken = 1
    with pytest.raises(OSError, match="the disk is gone"):
        source.slots.enter(1)
    assert source.slots.find(0) is None
    assert source.slots.find(1) is None
    source.broken = None
    assert source.slots.enter(1).memory.tolist() == [1] * 4
    assert source.slots.fills == {0: 1, 1: 1}


def test_entering_waits_until_a_slot_is_ready_and_fetching_does_not() -> None:
    source = Source(2)
    source.slots.fetch(0)
    assert source.tickets[0].count == 0
    source.slots.enter(0)
    assert source.tickets[0].count == 1


def test_what_used_a_slot_is_waited_for_once() -> None:
    slot = Slot(4, CPU)
    compute, store = Noted(), Noted()
    slot.uses = {"compute": compute, "store": store}
    assert slot.taken() == [compute, store]
    assert slot.taken() == []


def test_closed_slots_hold_nothing() -> None:
    source = Source(2)
    source.slots.enter(0)
    source.slots.close()
    assert source.slots.find(0) is None
