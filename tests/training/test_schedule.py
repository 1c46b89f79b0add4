"""The learning rate, step by step."""

import pytest

from sculptor.errors import SettingsError
from sculptor.training.schedule import learning_rate, warmup_steps
from sculptor.training.settings import TrainSettings


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 5])
def test_rises_then_falls(schedule: str, warmup: float) -> None:
    settings = TrainSettings(learning_rate=1.0, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    rates = [learning_rate(settings, step, 40, 1.0) for step in range(40)]
    peak = warmup_steps(settings, 40)
    assert peak == {0: 0, 0.1: 4, 5: 5}[warmup]
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak] == max(rates) == 1.0
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0


def test_known_values() -> None:
    cosine = TrainSettings(learning_rate=2.0, warmup=0)
    assert learning_rate(cosine, 5, 10, 2.0) == pytest.approx(1.0)
    linear = TrainSettings(learning_rate=2.0, warmup=2, schedule="linear")
    assert [learning_rate(linear, step, 6, 2.0) for step in range(6)] == pytest.approx([2 / 3, 4 / 3, 2, 1.5, 1, 0.5])
    assert learning_rate(TrainSettings(warmup=100), 0, 1, 5e-4) == 5e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": float("inf")},
        {"max_steps": 0},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1},
        {"warmup": -0.1},
        {"clip": -1},
        {"batch_size": 0},
        {"micro_batch_size": 0},
        {"max_length": 3},
        {"seed": -1},
        {"seed": 2**40},
        {"schedule": "sine"},
        {"save_dtype": "int8"},
        {"carry": "merged"},
        {"soften": -1},
        {"memory_rows": 0},
        {"memory_weight": 0},
        {"max_rows": 0},
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="--" + next(iter(wrong)).replace("_", "-")):
        TrainSettings(**wrong)  # type: ignore[arg-type]


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"--epochs.*--batch-size"):
        TrainSettings(epochs=-1, batch_size=0)
