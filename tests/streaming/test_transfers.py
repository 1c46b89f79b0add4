"""Lanes, tickets and host memory, where everything happens at once."""

import gc
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from sculptor.streaming.transfers import DONE, Staging, Ticket, Transfers, free_host_memory, host_memory

CPU = torch.device("cpu")


class Recorded(Ticket):
    """Says when it was waited for."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def wait(self) -> None:
        self.log.append(self.name)


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("lane", ["load", "store"])
def test_a_job_runs_at_once_and_after_what_it_waits_for(lane: str, threads: bool) -> None:
    transfers, log = Transfers(CPU, threads), list[str]()
    submit = getattr(transfers, lane)
    ticket = submit(lambda: log.append("job"), [Recorded("first", log), Recorded("second", log)])
    assert log == ["first", "second", "job"]
    ticket.wait()
    ticket.finish()
    transfers.drain()
    transfers.close()


def test_what_a_job_raises_reaches_the_caller() -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Transfers(CPU, threads=True).load(fail)


@pytest.mark.parametrize("method", ["wait", "finish"])
def test_a_ticket_of_a_thread_raises_what_its_job_raised(method: str) -> None:
    done: Future[Any] = Future()
    done.set_result(None)
    getattr(Ticket(done), method)()
    failed: Future[Any] = Future()
    failed.set_exception(OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        getattr(Ticket(failed), method)()


def test_a_cpu_has_nothing_to_mark_and_no_lanes() -> None:
    transfers = Transfers(CPU, threads=True)
    assert transfers.mark() is DONE
    assert not transfers.pinned
    with transfers.lane("update") as lane:
        assert lane is None


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 10_000])
def test_host_memory_is_exact_writable_and_begins_as_zeros(num_bytes: int) -> None:
    memory = host_memory(num_bytes, pinned=False)
    gc.collect()  # the mapping lives as long as the tensor does
    assert memory.shape == (num_bytes,)
    assert memory.dtype == torch.uint8
    assert not memory.any()
    memory.fill_(7)
    assert int(memory.sum(dtype=torch.int64)) == 7 * num_bytes
    free_host_memory(memory)  # it was never pinned


def test_more_host_memory_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        host_memory(2**50, pinned=False)


def test_staging_takes_its_two_pieces_in_turn() -> None:
    staging = Staging(CPU, 100)
    assert staging.num_bytes == 100
    taken = []
    for _ in range(4):
        taken.append(staging.take().data_ptr())
        staging.used()
    assert taken[0] == taken[2]
    assert taken[1] == taken[3]
    assert taken[0] != taken[1]
