"""Signals that end a run: at once, with what it staged put in order, or where a step says that it may end.

The command line installs `on_signal`. In a library nothing is installed, and Python's own rules hold.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came; no `except Exception` may keep it from whoever tidies up.

    Attributes:
        number: of the signal.
        kept: where something is that `--resume` can use; None if nothing is left.
        resumable: whether there could have been something.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.kept: Path | None = None
        self.resumable = False

    def __str__(self) -> str:
        left = "; nothing was done yet that --resume could go on with, start it again" if self.resumable else ""
        left = left if self.kept is None else f"; what is done is in {self.kept}, go on with --resume"
        return f"stopped by {signal.Signals(self.number).name}{left}"


class _Waiting:
    """Of this process: how many times it asked signals to wait, and the first that does."""

    depth = 0
    number: int | None = None


def catch_signals() -> None:
    """Lets signals that end a process raise `Interrupted`; one that is ignored, as by nohup, stays so."""
    if threading.current_thread() is threading.main_thread():
        _Waiting.depth, _Waiting.number = 0, None
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _on_signal)


def release_signals() -> None:
    """Gives signals back what they do by themselves."""
    for number in SIGNALS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _on_signal(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    if _Waiting.depth:
        _Waiting.number = number
        return
    raise Interrupted(number)


def asked_to_stop() -> int | None:
    """The signal that waits, if there is one; whoever asks answers it, and it is not raised."""
    number, _Waiting.number = _Waiting.number, None
    return number


@contextmanager
def signals_wait() -> Iterator[None]:
    """Around what has to be done as a whole, or asks by itself whether to go on: a signal is raised behind it.

    Not if it failed: that says what is left.
    """
    _Waiting.depth += 1
    number = None
    try:
        yield
    finally:
        _Waiting.depth -= 1
        if not _Waiting.depth:
            number, _Waiting.number = _Waiting.number, None
    if number is not None:
        raise Interrupted(number)
