"""Shares of an epoch."""

from collections import Counter

from sculptor.data.batches import BatchPlan
from sculptor.data.mixture import Mixture


def test_an_epoch_has_the_shares_and_ends_with_the_scarcest() -> None:
    mixture = Mixture((90, 1000), (0.9, 0.1))
    assert mixture.counts == (90, 10)
    assert mixture.num_epoch == 100
    assert Mixture((3, 3), (1e-6, 1.0)).counts == (1, 3)
    assert Mixture((5, 7), (1, 1)).counts == (5, 5)


def test_nothing_comes_twice_before_everything_came_once() -> None:
    mixture = Mixture((10, 40), (1.0, 1.0))
    seen: Counter[int] = Counter()
    for epoch in range(4):
        rows = mixture.rows(epoch, 7)
        assert len(set(rows)) == len(rows) == 20
        assert sum(i < 10 for i in rows) == 10
        seen.update(rows)
    assert set(seen) == set(range(50))
    assert [seen[i] for i in range(10, 50)] == [1] * 40
    assert mixture.rows(5, 7) == mixture.rows(5, 7) != mixture.rows(5, 8)


def test_batches_follow_the_mixture() -> None:
    mixture = Mixture((8, 32), (1.0, 1.0))
    plan = BatchPlan([1 + i % 5 for i in range(40)], 4, 0, mixture=mixture)
    assert plan.steps_per_epoch == 4
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in plan.rows(step)] for e in range(4)]
    for epoch, rows in enumerate(epochs):
        assert sorted(rows) == sorted(mixture.rows(epoch, 0))
    again = BatchPlan([1 + i % 5 for i in range(40)], 4, 0, mixture=mixture)
    assert again.rows(9) == plan.rows(9)


def test_the_mean_is_that_of_an_epoch() -> None:
    assert Mixture((2, 4), (1.0, 1.0)).mean([1, 3, 10, 10, 10, 10]) == (2 * 2 + 2 * 10) / 4
