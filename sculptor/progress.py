"""How the library reports progress without printing: callers hand in something like `tqdm.tqdm`."""

from typing import Protocol


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
