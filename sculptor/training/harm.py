"""Harm in a training: KL(base || new) on the archive's samples, measured every so often and kept below what a user allows.

Two things keep it there, both functions of what is measured, so a run that is taken up, or streamed, does the same:

* the learning rate is multiplied by a factor that a measurement moves: harm grows about as the square of the way that was gone,
  so with the budget h and the share s of the schedule's whole way that lies behind, the measured harm should be h s^2 at most;
* where it is above the budget all the same, the whole update is scaled back to the largest factor found that satisfies it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sculptor.model.harm import Harm, measure_harm
from sculptor.model.load import LoadedModel
from sculptor.model.samples import Samples
from sculptor.training.stepping.updates import Updates
from sculptor.world import World

# Of the time that training takes, what measuring may take; a forward is a third of a step's forward and backward.
_SHARE, _FORWARD = 0.05, 1 / 3
# A scale that satisfies the budget is good enough where it uses this share of it.
_CLOSE = 0.95
_TRIES = 8
# The learning rate's factor changes by at most so much at a measurement.
_MOST = 2.0


def steps_between(sample_tokens: int, step_tokens: float) -> int:
    """Steps between measurements that take a twentieth of the time at most, by the tokens that each reads."""
    return max(1, math.ceil(sample_tokens * _FORWARD / (_SHARE * step_tokens)))


def next_factor(factor: float, harm: float, allowed: float) -> float:
    """The learning rate's next factor, given the harm that there is and the one there may be by now."""
    wanted = math.sqrt(allowed / harm) if harm > 0 else _MOST
    return min(1.0, factor * min(_MOST, max(1 / _MOST, wanted)))


def largest_scale(harm_at: Callable[[float], float], harm: float, limit: float) -> tuple[float, float]:
    """A scale in [0, 1) of an update at which harm is at most `limit`, nearly the largest, and the harm there.

    Along a ray harm is about a parabola, so its root is about a line: regula falsi on it.

    Args:
        harm_at: measures it at a scale; called with the scale that is returned last.
        harm: at scale 1, above the limit.
        limit: above 0.
    """
    low, high = (0.0, 0.0), (1.0, math.sqrt(harm))
    goal = math.sqrt(limit * (1 + _CLOSE) / 2)
    scale = 0.0
    for _ in range(_TRIES):
        scale = low[0] + (high[0] - low[0]) * (goal - low[1]) / (high[1] - low[1])
        found = harm_at(scale)
        if _CLOSE * limit <= found <= limit:
            return scale, found
        if found > limit:
            high = scale, math.sqrt(found)
        else:
            low = scale, math.sqrt(max(found, 0.0))
    if low[0] != scale:
        return low[0], harm_at(low[0])
    return scale, low[1] ** 2
