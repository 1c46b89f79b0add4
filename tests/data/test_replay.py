"""Rows mixed into a task's: shares of an epoch, all of the task's rows in it, few rows again and again."""

import pytest

from sculptor.data.examples import Encoded, Example
from sculptor.data.mixture import Mixture
from sculptor.data.replay import Replay, with_replay


def rows(count: int, kind: int) -> tuple[Example, ...]:
    return tuple(Example((kind, i), (kind, i)) for i in range(count))


def of_an_epoch(mixed: Encoded, epoch: int = 0) -> list[Example]:
    assert mixed.mixture is not None
    return [mixed.examples[i] for i in mixed.mixture.rows(epoch, 3)]


@pytest.mark.parametrize(("size", "share"), [(3, 0.1), (500, 0.1), (7, 0.5), (1, 0.9), (40, 0.01)])
def test_an_epoch_is_the_task_and_the_share(size: int, share: float) -> None:
    task = Encoded(rows(90, 0), 1, 2, 3)
    mixed = with_replay(task, [Replay("old", share, rows(size, 1))])
    found = of_an_epoch(mixed)
    own = [example for example in found if example.input_ids[0] == 0]
    assert sorted(own, key=lambda e: e.input_ids) == list(task.examples), "every row of the task, once"
    others = [example.input_ids[1] for example in found if example.input_ids[0] == 1]
    assert len(others) == pytest.approx(share * len(found), abs=1)
    counts = [others.count(i) for i in range(size)]
    assert max(counts) - min(counts) <= max(1, max(counts)), "few are taken again and again"
    if size >= len(others):
        assert max(counts) == 1
        seen = {e.input_ids[1] for i in range(-(-size // len(others))) for e in of_an_epoch(mixed, i) if e.input_ids[0]}
        assert len(seen) > 0.6 * size, "the next epoch takes others"
    assert (mixed.num_dropped, mixed.num_cut, mixed.num_ended) == (1, 2, 3)


def test_a_mixture_stays_one_and_several_are_mixed_in() -> None:
    task = Encoded((*rows(60, 0), *rows(60, 1)), 0, 0, 0, Mixture((60, 60), (3.0, 1.0)))
    mixed = with_replay(task, [Replay("a", 0.2, rows(5, 2)), Replay("self", 0.3, rows(900, 3))])
    found = of_an_epoch(mixed)
    counts = [sum(example.input_ids[0] == kind for example in found) for kind in range(4)]
    assert counts == [60, 20, 32, 48]
    assert with_replay(task, []) is task
