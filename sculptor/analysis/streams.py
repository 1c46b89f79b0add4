"""Matrices whose rules are made side by side on a GPU, which one decomposition alone does not fill."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from sculptor.checkpoint.architecture import Target
from sculptor.numerics.transfer import free_bytes

Item = TypeVar("Item")
Made = TypeVar("Made")

MOST = 3


def working_bytes(target: Target, moments: bool) -> int:
    """Of the device's memory while a rule is made: float64 matrices, eigenvectors, what the eigensolver works in.

    Args:
        target: the matrix.
        moments: whether those of both of its sides are decomposed, or its smaller Gram matrix.
    """
    m, n = target.shape
    return 50 * max(m, n) ** 2 if moments else 56 * m * n


def num_streams(device: torch.device, needed: int, limit: float | None = None) -> int:
    """How many rules to make at a time: several on a GPU that has room for them.

    Args:
        device: where they are made.
        needed: bytes that one of them takes there.
        limit: bytes to stay within, with what is there already.
    """
    if device.type != "cuda":
        return 1  # its libraries use all cores for one
    room = free_bytes(device)
    if limit is not None:
        room = min(room, limit - torch.cuda.memory_allocated(device))
    return max(1, min(MOST, int(0.9 * room / max(1, needed))))


def in_streams(
    make: Callable[[Item], Made], items: Iterable[Item], device: torch.device, count: int
) -> Generator[Made]:
    """What is made of some items, in their order, each on a stream of its own thread; items are asked for here.

    A result is complete on the device when it is given. An item is held until then, so that memory of it is not used for
    something else while a stream still reads it.

    Args:
        make: gives the same whatever else is made at the time.
        items: as they come.
        device: where it is done.
        count: how many at a time; with 1 nothing happens in other threads.
    """
    if count == 1:
        yield from map(make, items)
        return
    local = threading.local()
    if device.type == "cuda":
        # Loads torch's library for decompositions, which two threads may not do at the same time.
        torch.linalg.eigvalsh(torch.eye(2, device=device))

    def work(item: Item, ready: torch.cuda.Event | None) -> Made:
        if ready is None:
            return make(item)
        if not hasattr(local, "stream"):
            local.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(local.stream):
            local.stream.wait_event(ready)
            made = make(item)
        local.stream.synchronize()
        return made

    pool = ThreadPoolExecutor(count)
    under_way: deque[Future[Made]] = deque()
    try:
        for item in items:
            ready = None
            if device.type == "cuda":
                ready = torch.cuda.current_stream(device).record_event()
            under_way.append(pool.submit(work, item, ready))
            del item
            if len(under_way) > count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
