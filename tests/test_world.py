"""Shares of several processes: together the whole, each item once."""

import itertools
from concurrent.futures import Future

import pytest
import torch
from together import Failed, fail_at_work, fail_once, fail_together, together, work_later, world_tour

from sculptor import peers
from sculptor.data.batches import BatchPlan
from sculptor.errors import OutputError, PeerError, SettingsError
from sculptor.world import World, asked

SIZES = (1, 2, 3, 4)

COVERS = ["sculptor.peers"]


def worlds(size: int) -> list[World]:
    return [World(rank, size) for rank in range(size)]


def interleaved(parts: list[list[int]]) -> list[int]:
    """Parts put together again, one item of each in turn."""
    rounds = itertools.zip_longest(*parts)
    return [item for items in rounds for item in items if item is not None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 32])
def test_shares_are_a_partition(size: int, count: int) -> None:
    items = list(range(100, 100 + count))
    parts = [list(world.share(items)) for world in worlds(size)]
    assert sorted(itertools.chain(*parts)) == items
    assert interleaved(parts) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1, "nobody has more to do than others"
    assert all(part == sorted(part) for part in parts)


def test_one_process_gets_the_very_same() -> None:
    items = (3, 1, 2)
    assert World().share(items) is items
    assert World() == World(0, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (7, 3), (24, 8), (25, 8), (130, 2)])
def test_batches_of_all_are_those_of_one(rows: int, batch_size: int, size: int) -> None:
    lengths = [5 + (7 * i) % 11 for i in range(rows)]
    whole = BatchPlan(lengths, batch_size, 3)
    plans = [BatchPlan(lengths, batch_size, 3, world) for world in worlds(size)]
    assert {plan.steps_per_epoch for plan in plans} == {whole.steps_per_epoch}, "all take as many steps"
    for step in range(2 * whole.steps_per_epoch + 1):
        expected = whole.rows(step)
        parts = [plan.rows(step) for plan in plans]
        assert interleaved(parts) == expected
        for part in parts:
            assert [lengths[i] for i in part] == sorted((lengths[i] for i in part), reverse=True), "longest first"


@pytest.mark.parametrize("size", SIZES)
def test_every_row_is_read_once_an_epoch(size: int) -> None:
    plans = [BatchPlan([4] * 21, 4, 0, world) for world in worlds(size)]
    read = [row for step in range(plans[0].steps_per_epoch) for plan in plans for row in plan.rows(step)]
    assert sorted(read) == list(range(21))


def test_a_caller_may_change_what_it_got() -> None:
    plan = BatchPlan([4] * 8, 4, 0)
    first = plan.rows(0)
    copy = list(first)
    first.clear()
    assert plan.rows(0) == copy


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (2, 2), (0, 0), (0, -1)])
def test_ranks_outside_are_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {size} processes"):
        World(rank, size)


def test_alone_everything_is_ones_own() -> None:
    world, tensor = World(), torch.tensor([2.0])
    assert world.total(7, 0.5) == [7, 0.5]
    assert world.most(3) == 3
    assert world.gather("x") == ["x"]
    assert world.from_first("x") == "x"
    assert world.once(lambda: "x") == "x"
    world.add_up([tensor])
    assert tensor == 2.0
    assert list(world.in_order([1, 2], lambda item: [item, -item])) == [1, -1, 2, -2]
    with pytest.raises(KeyError), world.together():
        raise KeyError


def test_every_process_hears_of_all() -> None:
    for rank, found in enumerate(together(3, world_tour)):
        assert found["total"] == [6.0, 0.75]
        assert found["most"] == 2
        assert found["gather"] == ["of 0", "of 1", "of 2"]
        assert found["from_first"] == "of 0"
        assert found["once"] == "done by 0"
        assert found["sums"] == [[[3.0] * 5] * 2, [6] * 3, [[0.0] * 4] * 4, [3.0] * 40]
        expected = [(item, part) for item in range(7) for part in "ab"] if rank == 0 else []
        assert found["in_order"] == expected
        assert found["at_work"] == sorted(range(rank, 7, 3))


@pytest.mark.parametrize("failing", [0, 2])
def test_what_fails_in_one_fails_in_all(failing: int) -> None:
    with pytest.raises(Failed) as found:
        together(3, fail_together, failing)
    for rank, error in enumerate(found.value.errors):
        assert error is not None
        assert error[0] == ("DataError" if rank == failing else "PeerError"), rank


def test_what_the_first_fails_at_fails_in_all() -> None:
    with pytest.raises(Failed) as found:
        together(2, fail_once)
    assert [error and error[0] for error in found.value.errors] == ["DataError", "PeerError"]


def test_work_that_fails_elsewhere_is_told_there() -> None:
    with pytest.raises(Failed) as found:
        together(2, fail_at_work)
    first, second = found.value.errors
    assert first == ("PeerError", "another process of this run failed")
    assert second == ("DataError", "item 3")


def test_what_takes_its_time_comes_in_order_too() -> None:
    first, second = together(2, work_later, -1)
    assert first == [f"{word} {i}" for i in range(5) for word in ("first", "late")]
    assert second == []


@pytest.mark.parametrize("failing", [1, 3])
def test_what_fails_later_is_told_where_it_failed(failing: int) -> None:
    with pytest.raises(Failed) as found:
        together(2, work_later, failing)
    first, second = found.value.errors
    assert first == ("PeerError", "another process of this run failed")
    assert second == ("OutputError" if failing == 1 else "ValueError", f"item {failing}")


def test_a_launcher_that_contradicts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, size in (("2", "2"), ("x", "2"), ("0", "many")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(SettingsError, match="expected numbers"):
            asked()


def test_what_failed_here_is_told_though_the_first_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a disk is full for all of them."""

    def gone(_: bytes) -> None:
        raise RuntimeError("Connection closed by peer")

    failed: Future[str] = Future()
    failed.set_exception(OutputError("no room"))
    monkeypatch.setattr(peers, "_send", gone)
    with pytest.raises(OutputError, match="no room"), peers.Sender() as sender:
        sender.send(failed)
    with pytest.raises(PeerError, match="Connection closed"), peers.Sender() as sender:
        sender.send(b"result")
