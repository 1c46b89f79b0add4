"""When states are saved: seldom enough that they take a twentieth of the time, and as often as somebody says."""

import pytest

from sculptor import TrainSettings
from sculptor.training import saves
from sculptor.training.saves import Saves

A_SECOND = round(5e8 / 12)  # numbers whose state takes one, until it was measured


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(saves.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("since", "done", "due"),
    [(19, 10, False), (21, 10, True), (21, 11, False), (9, 100, False), (11, 100, True)],
)
def test_a_twentieth_of_the_time_and_a_tenth_in_the_end(clock: list[float], since: float, done: int, due: bool) -> None:
    found = Saves(A_SECOND, TrainSettings(), 100)
    clock[0] += since
    assert found.due(done) is due


def test_what_it_took_counts_once_that_is_known(clock: list[float]) -> None:
    found = Saves(A_SECOND, TrainSettings(), 100)
    clock[0] += 25
    with found.timed():
        clock[0] += 3
    clock[0] += 59
    assert not found.due(20)
    assert found.due(100)
    clock[0] += 2
    assert found.due(20)


@pytest.mark.usefixtures("clock")
def test_as_often_as_somebody_says() -> None:
    found = Saves(A_SECOND, TrainSettings(save_every=7), 100)
    steps = [*range(7, 100, 7), 100]
    assert [done for done in range(1, 101) if found.due(done)] == steps
    assert [done for done in range(1, 101) if found.may_be(done)] == steps
