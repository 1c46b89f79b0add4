"""What the steps of a run are made of, by hand and as the loop has it."""

from dataclasses import replace

import pytest

from sculptor import TrainSettings
from sculptor.data.batches import BatchPlan
from sculptor.data.examples import Encoded, Example
from sculptor.data.mixture import Mixture
from sculptor.training.steps import Steps

SETTINGS = TrainSettings(batch_size=4, epochs=3, device="cpu")
ROWS = Encoded(tuple(Example((1,) * n, (1,) * n) for n in (2, 3, 4, 5, 6, 7, 8, 9, 10)), 0, 0)


def test_by_hand() -> None:
    assert Steps.of(ROWS, SETTINGS) == Steps(SETTINGS, num_epoch=9, rows=4, longest=10, mean=6.0, total=9)
    assert Steps.of(ROWS, replace(SETTINGS, max_steps=5, epochs=1)).total == 5


def test_fewer_rows_than_a_step_takes_are_a_step() -> None:
    few = replace(ROWS, examples=ROWS.examples[:3])
    assert Steps.of(few, SETTINGS) == Steps(SETTINGS, num_epoch=3, rows=3, longest=4, mean=3.0, total=3)
    assert Steps.of(replace(ROWS, examples=()), SETTINGS).rows == 1


def test_few_rows_are_passed_over_again_in_small_steps_unless_that_is_said() -> None:
    """Up to five passes where there would be fewer than 60 steps, then as few as 4 rows where there would be fewer than 140."""
    usual = TrainSettings(device="cpu")
    sizes = (1, 3, 8, 80, 200, 479, 480, 639, 640, 959, 960, 1500, 1919, 1920, 3200, 10**6)
    assert [usual.for_rows(n).epochs for n in sizes] == [5, 5, 5, 5, 5, 5, 4, 4, 3, 3, 2, 2, 2, 1, 1, 1]
    assert [usual.rows_of_step(n) for n in sizes] == [1, 3, 4, 4, 7, 17, 13, 18, 13, 20, 13, 21, 27, 13, 22, 32]
    assert [usual.total_steps(n) for n in (1, 8, 60, 80, 200, 640, 960, 1920)] == [5, 10, 75, 100, 145, 150, 148, 148]
    once = replace(usual, epochs=1)
    assert [once.rows_of_step(n) for n in (100, 480, 799, 3199, 4480)] == [4, 4, 5, 22, 32]
    by_64 = replace(usual, batch_size=64)
    assert [by_64.for_rows(n).epochs for n in (760, 1000, 1920, 3840)] == [5, 4, 2, 1]
    assert by_64.rows_of_step(100) == 64
    decided = replace(usual, max_steps=9)
    assert (decided.rows_of_step(100), decided.for_rows(100).epochs, decided.total_steps(100)) == (32, 1, 9)
    few = replace(ROWS, examples=ROWS.examples * 20)
    filled = replace(usual, epochs=5.0, batch_size=6)
    assert Steps.of(few, usual) == Steps(filled, num_epoch=180, rows=6, longest=10, mean=6.0, total=150)


def test_an_epoch_of_fewer_rows_than_there_are() -> None:
    found = Steps.of(ROWS, TrainSettings(device="cpu"), 3)
    assert (found.num_epoch, found.rows, found.longest, found.mean, found.total) == (3, 3, 10, 6.0, 5)


@pytest.mark.parametrize("mixture", [None, Mixture((6, 3), (1.0, 1.0))])
def test_an_epoch_is_the_loop_s(mixture: Mixture | None) -> None:
    found = Steps.of(replace(ROWS, mixture=mixture), SETTINGS)
    plan = BatchPlan([example.length for example in ROWS.examples], SETTINGS.batch_size, 0, mixture=mixture)
    assert found.total == 3 * plan.steps_per_epoch
    if mixture is not None:  # three of the first, whose mean length is 4.5, and all of the others, whose is 9
        assert found.mean == pytest.approx(6.75)


def test_few_steps_are_told() -> None:
    told: list[str] = []
    Steps.of(ROWS, SETTINGS).tell(SETTINGS, told.append)
    assert told == [
        "few steps to learn from: 9 in all, with --epochs 3 and 4 rows in each; more epochs, or fewer rows (--batch-size), "
        "make more"
    ]
    more = replace(SETTINGS, epochs=10)
    Steps.of(ROWS, more).tell(more, told.append)
    assert len(told) == 1, "30 steps, all as asked"


def test_what_was_chosen_is_told() -> None:
    told: list[str] = []
    many = replace(ROWS, examples=ROWS.examples * 20)
    for asked in ({}, {"epochs": 2.0}, {"batch_size": 6}, {"max_steps": 2}):
        settings = TrainSettings(device="cpu", **asked)
        Steps.of(many, settings).tell(settings, told.append)
    assert told == [
        "chosen: --epochs 5 --batch-size 6: 150 steps, for 180 rows",
        "chosen: --batch-size 4: 90 steps, for 180 rows",
        "chosen: --epochs 2: 60 steps, for 180 rows",
    ]


def test_a_warm_up_that_the_run_does_not_hold_is_told() -> None:
    told: list[str] = []
    for warmup in (0.5, 8, 9, 20):
        settings = replace(SETTINGS, warmup=warmup, max_steps=9)
        Steps.of(ROWS, settings).tell(settings, told.append)
    assert told == ["--warmup 9: of 9 steps the rate rises for 8", "--warmup 20: of 9 steps the rate rises for 8"]
