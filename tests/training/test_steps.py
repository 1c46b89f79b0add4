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
    assert Steps.of(ROWS, SETTINGS) == Steps(rows=4, longest=10, mean=6.0, total=9)
    assert Steps.of(ROWS, replace(SETTINGS, max_steps=5, epochs=1)).total == 5


def test_fewer_rows_than_a_step_takes_are_a_step() -> None:
    few = replace(ROWS, examples=ROWS.examples[:3])
    assert Steps.of(few, SETTINGS) == Steps(rows=3, longest=4, mean=3.0, total=3)
    assert Steps.of(replace(ROWS, examples=()), SETTINGS).rows == 1


def test_few_rows_make_small_steps_unless_that_is_said() -> None:
    """32 rows, and as few as 8 where a run would have fewer than 25 steps."""
    usual = TrainSettings(device="cpu")
    assert [usual.rows_of_step(n) for n in (1, 7, 8, 100, 200, 300, 799, 800, 10**6)] == [1, 7, 8, 8, 8, 12, 31, 32, 32]
    assert [replace(usual, epochs=4).rows_of_step(n) for n in (100, 200)] == [16, 32]
    assert replace(usual, max_steps=9).rows_of_step(100) == 32, "then the steps are decided"
    assert replace(usual, batch_size=64).rows_of_step(100) == 64
    few = replace(ROWS, examples=ROWS.examples * 20)
    assert Steps.of(few, usual) == Steps(rows=8, longest=10, mean=6.0, total=23)


@pytest.mark.parametrize("mixture", [None, Mixture((6, 3), (1.0, 1.0))])
def test_an_epoch_is_the_loop_s(mixture: Mixture | None) -> None:
    found = Steps.of(replace(ROWS, mixture=mixture), SETTINGS)
    plan = BatchPlan([example.length for example in ROWS.examples], SETTINGS.batch_size, 0, mixture=mixture)
    assert found.total == SETTINGS.total_steps(plan.steps_per_epoch)
    if mixture is not None:  # three of the first, whose mean length is 4.5, and all of the others, whose is 9
        assert found.mean == pytest.approx(6.75)


def test_few_steps_are_told() -> None:
    told: list[str] = []
    Steps.of(ROWS, SETTINGS).tell_few(3, told.append)
    assert told == [
        "few steps to learn from: 9 in all, with --epochs 3 and 4 rows in each; more epochs, or fewer rows (--batch-size), "
        "make more"
    ]
    Steps.of(ROWS, replace(SETTINGS, epochs=10)).tell_few(10, told.append)
    assert len(told) == 1
