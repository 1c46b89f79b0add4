"""How the library reports progress without printing: callers hand in something like `tqdm.tqdm`, or `bars`."""

import io
import sys
from typing import Protocol

SHOWN_AFTER = 2.0  # seconds that go without a bar


class Bar(Protocol):
    """One bar; `tqdm.tqdm` objects fit."""

    def update(self, n: int = 1) -> object: ...
    def set_postfix_str(self, s: str, refresh: bool = True) -> object: ...
    def close(self) -> object: ...


class Progress(Protocol):
    """Makes a bar that counts from `initial` to `total`."""

    def __call__(self, *, total: int, desc: str, unit: str, initial: int = 0) -> Bar: ...


class _Silent:
    def update(self, n: int = 1) -> None: ...
    def set_postfix_str(self, s: str, refresh: bool = True) -> None: ...
    def close(self) -> None: ...


def silent(*, total: int, desc: str, unit: str, initial: int = 0) -> Bar:
    """Reports nothing: the library's default."""
    return _Silent()


def bars(*, total: int, desc: str, unit: str, initial: int = 0) -> Bar:
    """Progress on stderr with time left, shown only for what takes over two seconds; in a log file by lines."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    bar: Bar = tqdm(
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        delay=SHOWN_AFTER,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 10,  # a log file wants a line now and then
        unit_scale=unit == "B",
        leave=False,
        file=sys.stderr if terminal else _Lines(),
    )
    return bar


class _Lines(io.StringIO):
    """Standard error that is no terminal: every state of a bar is a line of its own, and the end of one is none."""

    def write(self, text: str) -> int:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        return len(text)
