"""How several processes talk: what through, results on their way to the first of them, and how one that has gone is told."""

import pickle
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from sculptor.errors import PeerError

T = TypeVar("T")

_WAITING_BYTES = 4 * 2**30  # of results on their way to the first process, in host memory
# Some steps take long in one process while the others wait: writing a large checkpoint, sampling.
PATIENCE = timedelta(hours=12)
END, FAILED = b"", b"failed"


_host: Any = None


def host_group() -> Any:
    """Objects travel between hosts' memories: beside NCCL alone, as another program may have set it up, in a group of their own."""
    global _host
    if "gloo" in str(dist.get_backend_config()):
        return None
    if _host is None:
        _host = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _host


def forget_host_group() -> None:
    """It went with all others."""
    global _host
    _host = None


def collectively(call: Callable[[], T]) -> T:
    """Does it; where another process has gone away, says so in one line."""
    try:
        return call()
    except RuntimeError as cause:
        if isinstance(cause, torch.OutOfMemoryError):
            raise
        raise PeerError(ended(cause)) from cause


def ended(cause: BaseException) -> str:
    return f"another process of this run ended ({line_of(cause)}); look at what it said, and start the run again"


def line_of(cause: BaseException) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:120]


def received(rank: int) -> Iterator[Any]:
    while (content := _receive(rank)) != END:
        if content == FAILED:
            raise PeerError("another process of this run failed", told=True)
        yield pickle.loads(content)


def pickled(result: Any) -> bytes:
    return pickle.dumps(result, protocol=5)


def _receive(rank: int) -> bytes:
    size = torch.zeros(1, dtype=torch.int64)
    collectively(lambda: dist.recv(size, src=rank, group=host_group()))
    content = torch.empty(int(size), dtype=torch.uint8)
    if content.numel():
        collectively(lambda: dist.recv(content, src=rank, group=host_group()))
    return content.numpy().tobytes()


def _send(content: bytes) -> None:
    dist.send(torch.tensor([len(content)]), dst=0, group=host_group())
    if content:
        dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), dst=0, group=host_group())


class Sender:
    """Sends in a thread, so that work goes on while the first process is busy with its own; what waits is bounded."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[bytes | Future[Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._waiting = 0
        self._failed: BaseException | None = None
        self._is_own = False  # what failed was to be made here, not to be sent
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # else this process ends, and with it what the first one waits for
            self.finish()

    def finish(self) -> None:
        """Everything is with the first process."""
        self._queue.put(None)
        self._thread.join()
        self._check()

    def send(self, content: bytes | Future[Any]) -> None:
        """Once there is room for it; of a future, its result once that is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or not self._waiting or self._waiting < _WAITING_BYTES)
            self._waiting += _size(content)
        self._check()
        self._queue.put(content)

    def _check(self) -> None:
        if self._failed is not None and self._is_own:
            raise self._failed
        if self._failed is not None:
            raise PeerError(ended(self._failed)) from self._failed

    def _run(self) -> None:
        while (content := self._queue.get()) is not None:
            try:
                self._send(content)
            except Exception as cause:
                self._failed = cause
            with self._changed:
                self._waiting -= _size(content)
                self._changed.notify_all()
            if self._failed:
                return

    def _send(self, content: bytes | Future[Any]) -> None:
        try:
            sent = pickled(content.result()) if isinstance(content, Future) else content
        except Exception:
            self._is_own = True
            with suppress(RuntimeError):  # the first may have gone for the same reason
                _send(FAILED)
            raise
        _send(sent)


def _size(content: bytes | Future[Any]) -> int:
    return 0 if isinstance(content, Future) else len(content)
