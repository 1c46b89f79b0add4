"""The learning rate as a function of the step, so that there is no state to save."""

import functools
import math
from collections.abc import Callable

from sculptor.training.settings import TrainSettings

# The rate of a step, given the peak of a parameter's.
RateOf = Callable[[float], float]


def warmup_steps(settings: TrainSettings, total: int) -> int:
    """Steps with rising learning rate, fewer than all."""
    asked = settings.warmup * total if settings.warmup < 1 else settings.warmup
    return min(round(asked), total - 1)


def learning_rate(settings: TrainSettings, step: int, total: int, peak: float) -> float:
    """Learning rate of a step (counted from 0): a linear rise to the peak, then the schedule's fall.

    The last step still has a rate above 0, the one after it would have 0.
    """
    warmup = warmup_steps(settings, total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.schedule]
    return peak * factor


def rates_of(settings: TrainSettings, step: int, total: int) -> RateOf:
    """A step's rate for any peak."""
    return functools.partial(learning_rate, settings, step, total)
