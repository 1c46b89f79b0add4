"""Tensors read by threads before they are asked for."""

import threading

import pytest
import torch
from torch import Tensor

from sculptor.checkpoint import ahead
from sculptor.checkpoint.ahead import ReadAhead
from sculptor.errors import ArchiveError

SIZES = dict.fromkeys("abcdefgh", 4)


class Source:
    """What is read, by whom."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.threads: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Tensor:
        with self._lock:
            self.read.append(name)
            self.threads[name] = threading.get_ident()
        if name == "h":
            raise ArchiveError("h is damaged")
        return torch.full((1,), float(ord(name)))


@pytest.fixture
def source() -> Source:
    return Source()


def test_all_are_read_once_by_threads_and_handed_out_in_any_order_of_a_group(source: Source) -> None:
    reading = ReadAhead(source, ["ab", "cd", "ef"], SIZES)
    assert [float(reading.take(name)) for name in "badcfe"] == [ord(name) for name in "badcfe"]
    reading.close()
    assert sorted(source.read) == list("abcdef")
    assert threading.get_ident() not in source.threads.values()


def test_what_is_asked_for_again_or_is_none_of_them_is_read_anew(source: Source) -> None:
    reading = ReadAhead(source, ["a", "ab"], SIZES)
    assert [float(reading.take(name)) for name in "aabg"] == [ord(name) for name in "aabg"]
    reading.close()
    assert sorted(source.read) == list("aabg")


def test_what_nobody_asks_for_makes_room(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_BYTES", 8)
    reading = ReadAhead(source, "abcdefg", SIZES)
    assert float(reading.take("a")) == ord("a")
    assert float(reading.take("e")) == ord("e")
    assert float(reading.take("c")) == ord("c")  # behind: read here
    assert float(reading.take("g")) == ord("g")
    reading.close()
    assert "d" not in source.read
    assert reading._bytes == 0


def test_as_much_is_read_ahead_as_is_allowed_and_one_at_least(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_BYTES", 10)
    reading = ReadAhead(source, "abcde", SIZES | {"d": 100})
    reading.take("a")
    reading._pool.shutdown(wait=True)
    assert sorted(source.read) == list("abc")
    reading.close()
    reading = ReadAhead(source, "de", SIZES | {"d": 100})
    assert float(reading.take("d")) == ord("d")
    reading.close()


def test_what_a_thread_finds_wrong_is_said_where_it_is_asked_for(source: Source) -> None:
    reading = ReadAhead(source, "gh", SIZES)
    reading.take("g")
    with pytest.raises(ArchiveError, match="h is damaged"):
        reading.take("h")
    reading.close()
