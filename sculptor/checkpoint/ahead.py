"""Tensors that threads read and check while what was asked for before them is worked on."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

# What is read and not yet asked for; one tensor may be larger.
MAX_BYTES = 256 * 2**20
_THREADS = 4


class ReadAhead:
    """Reads tensors in the order in which they will be asked for.

    What is not asked for is given up as soon as something behind its group is.

    Args:
        read: reads one by name, in any thread.
        groups: names that are asked for together, in any order; of each name its first place counts.
        sizes: bytes of each.
    """

    def __init__(
        self, read: Callable[[str], Tensor], groups: Iterable[Iterable[str]], sizes: Mapping[str, int]
    ) -> None:
        self._read, self._sizes = read, sizes
        seen: dict[str, int] = {}
        for group, names in enumerate(groups):
            for name in names:
                seen.setdefault(name, group)
        self._group = seen
        self._waiting = deque(seen)
        self._coming: dict[str, Future[Tensor]] = {}
        self._bytes = 0
        self._pool = ThreadPoolExecutor(max_workers=_THREADS)

    def take(self, name: str) -> Tensor:
        """One of them; what is none, or was taken before, is read here.

        Raises:
            Exception: whatever reading it raises.
        """
        if name not in self._group:
            return self._read(name)
        reached = self._group[name]
        for passed in list(itertools.takewhile(lambda each: self._group[each] < reached, self._coming)):
            self._drop(passed)
        while self._waiting and self._group[self._waiting[0]] < reached:
            self._group.pop(self._waiting.popleft())
        self._fill()
        coming = self._drop(name)
        self._fill()
        return self._read(name) if coming is None else coming.result()

    def close(self) -> None:
        """Ends its threads; what they have read is given up."""
        self._waiting.clear()
        for coming in self._coming.values():
            coming.cancel()
        self._pool.shutdown(wait=True)
        self._coming.clear()

    def _fill(self) -> None:
        while self._waiting and (not self._coming or self._bytes + self._sizes[self._waiting[0]] <= MAX_BYTES):
            name = self._waiting.popleft()
            self._bytes += self._sizes[name]
            self._coming[name] = self._pool.submit(self._read, name)

    def _drop(self, name: str) -> Future[Tensor] | None:
        """One that comes, or None, which is no longer counted."""
        self._group.pop(name, None)
        coming = self._coming.pop(name, None)
        if coming is None:
            if name in self._waiting:
                self._waiting.remove(name)
        else:
            self._bytes -= self._sizes[name]
        return coming
