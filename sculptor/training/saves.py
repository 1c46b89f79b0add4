"""When a run's state is worth the time to save it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sculptor.training.settings import TrainSettings

# Of a state, for each number that is trained: itself and two of AdamW; and how fast disks are, until one was measured.
_BYTES = 12
_BYTES_A_SECOND = 5e8
# A twentieth of the time goes into states at most, a tenth into the last one: what comes behind it takes long, too.
_SELDOM, _SELDOM_LAST = 20, 10


class Saves:
    """Of one run. What is not saved is trained again after a crash, to the same bits.

    Args:
        num_trainable: numbers that are trained.
        settings: resolved; `save_every` is kept to whatever it takes.
        total: steps of the run.
    """

    def __init__(self, num_trainable: int, settings: TrainSettings, total: int) -> None:
        self.settings = settings
        self.total = total
        self._takes = _BYTES * num_trainable / _BYTES_A_SECOND
        self._last = time.perf_counter()

    def may_be(self, done: int) -> bool:
        """Whether this is a step at which states are saved at all; the same in all processes."""
        return done == self.total or done % self.settings.steps_between_saves(self.total) == 0

    def due(self, done: int) -> bool:
        """Whether it is worth the time after so many steps, as this process sees it."""
        since = time.perf_counter() - self._last
        seldom = _SELDOM_LAST if done == self.total else _SELDOM
        return self.may_be(done) and (self.settings.save_every is not None or since >= seldom * self._takes)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around saving."""
        started = time.perf_counter()
        yield
        self._last = time.perf_counter()
        self._takes = self._last - started
