"""Copies beside the computation: a lane for loading, one for storing, one for updates, and what waits for what.

On a GPU a lane is a stream, and waiting is done by the GPU; where a disk is involved, each lane of copies also has a
thread, which the caller waits for only when it needs the data. On a CPU everything happens at once.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

_M_MMAP_THRESHOLD = -3  # malloc.h


class Ticket:
    """Something under way: a job of a thread, or work that a stream has been given."""

    def __init__(self, future: "Future[Any] | None" = None, event: Any = None) -> None:
        self._future = future
        self._event = event

    def wait(self) -> None:
        """The current stream goes on only when it is done; raises what a job raised."""
        event = self._event if self._future is None else self._future.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def finish(self) -> None:
        """Returns when it is done."""
        event = self._event if self._future is None else self._future.result()
        if event is not None:
            event.synchronize()


DONE = Ticket()


class Transfers:
    """The lanes of one device.

    Args:
        device: where the computation is.
        threads: whether copies read or write files.
    """

    def __init__(self, device: torch.device, threads: bool) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        if on_gpu and device.index is not None:
            torch.cuda.set_device(device)  # streams and events of one that is not current would order nothing
        self.pinned = on_gpu
        self._failure: BaseException | None = None
        # Updates come in many short kernels, which would each wait for the model's long ones, and copies wait for them.
        priorities = {"load": 0, "store": 0, "update": -1, "inputs": 0}
        self._streams = {name: _stream(device, value) for name, value in priorities.items()} if on_gpu else {}
        self._threads = (
            {name: ThreadPoolExecutor(1, thread_name_prefix=f"sculptor-{name}") for name in ("load", "store")}
            if threads and on_gpu
            else {}
        )

    def lane(self, name: str) -> AbstractContextManager[Any]:
        """Work inside goes to a lane."""
        return torch.cuda.stream(self._streams[name]) if self._streams else nullcontext()

    def mark(self) -> Ticket:
        """What the current stream has been given so far."""
        return Ticket(event=torch.cuda.current_stream(self.device).record_event()) if self._streams else DONE

    def load(self, job: Callable[[], None], after: Iterable[Ticket] = ()) -> Ticket:
        """Runs a copy to the device on the loading lane."""
        return self._submit("load", job, tuple(after))

    def store(self, job: Callable[[], None], after: Iterable[Ticket] = ()) -> Ticket:
        """Runs a copy from the device on the storing lane."""
        return self._submit("store", job, tuple(after))

    def send_input(self, job: Callable[[], None], after: Iterable[Ticket] = ()) -> Ticket:
        """Runs a copy to host memory on a lane of its own, past whatever is on its way to files."""
        return self._submit("inputs", job, tuple(after))

    def drain(self) -> None:
        """Returns when everything stored so far has arrived."""
        self.store(lambda: None).finish()
        if self._failure is not None:
            raise self._failure

    def _submit(self, lane: str, job: Callable[[], None], after: tuple[Ticket, ...]) -> Ticket:
        if self._failure is not None:  # what was to be kept is lost, so nothing may go on
            raise self._failure

        def run() -> Any:
            try:
                with self._on(lane):
                    for ticket in after:
                        ticket.wait()
                    job()
                    return self.mark()._event
            except BaseException as failure:
                self._failure = failure
                raise

        if lane in self._threads:
            return Ticket(self._threads[lane].submit(run))
        return Ticket(event=run())

    @contextmanager
    def _on(self, lane: str) -> Iterator[None]:
        if not self._streams:
            yield
            return
        with torch.cuda.device(self.device), torch.no_grad(), self.lane(lane):
            yield

    def settle(self) -> None:
        """Returns when nothing is under way any more, whatever became of it."""
        for thread in self._threads.values():
            thread.submit(lambda: None).result()
        if self._streams:
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Ends the threads, after what they have been given."""
        self.settle()
        for thread in self._threads.values():
            thread.shutdown()
        self._threads.clear()


class Staging:
    """Two pieces of host memory, used in turn, between a file and a device.

    Args:
        device: where data go to or come from.
        num_bytes: size of each.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._memory = [host_memory(num_bytes, device.type == "cuda") for _ in range(2)]
        self._busy = [DONE, DONE]
        self._on_gpu = device.type == "cuda"

    @property
    def num_bytes(self) -> int:
        """Size of each."""
        return self._memory[0].numel()

    def close(self) -> None:
        """Gives the memory back."""
        while self._memory:
            self._busy.pop().finish()
            free_host_memory(self._memory.pop())

    def take(self) -> Tensor:
        """The next piece, when it is free."""
        self._memory.reverse()
        self._busy.reverse()
        self._busy[0].finish()
        return self._memory[0]

    def used(self) -> None:
        """The current stream has been given the copy from or to the piece taken last."""
        if self._on_gpu:
            self._busy[0] = Ticket(event=torch.cuda.current_stream().record_event())


def _stream(device: torch.device, priority: int) -> Any:
    return torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def return_freed_memory() -> None:
    """Has glibc give back large pieces when they are freed, where it would keep ever more of them for itself.

    Activations come in pieces of some megabytes, for which its threshold rises; on a CPU they would more than double
    what a streamed model takes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def host_memory(num_bytes: int, pinned: bool) -> Tensor:
    """Bytes of host memory; pinned exactly, where torch's own pinned memory comes in powers of two.

    Raises:
        MemoryError: if the system gives or pins no more.
    """
    import mmap

    try:
        mapped = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as cause:
        raise MemoryError(f"cannot get {num_bytes / 1e9:.1f} GB of host memory ({cause})") from cause
    if pinned and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # fewer pages to pin, and to find when AdamW goes through them
            mapped.madvise(mmap.MADV_HUGEPAGE)  # of private memory: shared memory follows another setting of the kernel
    memory = torch.frombuffer(mapped, dtype=torch.uint8)  # keeps the mapping alive
    if pinned and num_bytes:
        code = int(_runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if code != 0:
            raise MemoryError(f"cannot pin {num_bytes / 1e9:.1f} GB of host memory (CUDA error {code})")
        _pinned[memory.data_ptr()] = memory.numel()
    return memory[:num_bytes]


def free_host_memory(memory: Tensor) -> None:
    """Unpins memory, before the last reference to it goes."""
    if _pinned.pop(memory.data_ptr(), None) is not None:
        _runtime().cudaHostUnregister(memory.data_ptr())


_pinned: dict[int, int] = {}
