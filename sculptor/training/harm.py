"""Harm in a training: KL(base || new) on the archive's samples, measured every so often and kept below what a user allows.

Where it is above the limit, the whole update is scaled back to the largest factor found that satisfies it: a trust region, whose
radius is in nats. The optimizer goes on from there, so over a run this is gradient descent projected along rays; as the learning
rate falls it settles where the task's gradient is worth it. All of it follows from what is measured: a run that is taken up, or
streamed, does the same. What was tried beside it is in docs/harm.md.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from sculptor.model.harm import Harm, NamedHarm, measure_harm
from sculptor.model.load import LoadedModel
from sculptor.model.protected import Protected, measure_protected
from sculptor.model.samples import Sample, Samples
from sculptor.training.stepping.updates import Updates
from sculptor.world import ALONE, World

LossesOf = Callable[[Sequence[Sample]], Tensor]
# Of the time that training takes, what measuring may take; a forward is a third of a step's forward and backward.
_SHARE, _FORWARD = 0.05, 1 / 3
# A scale that satisfies the budget is good enough where it uses this share of it.
_CLOSE = 0.95
_TRIES = 8
# What a task may add where nobody says how much: single tasks learn as much within it, but for noise (docs/harm.md), and in a
# sequence of conversations it is what keeps the tasks of before (docs/benchmarks.md).
ADDED = 0.02


def steps_between(sample_tokens: int, step_tokens: float) -> int:
    """Steps between measurements that take a twentieth of the time at most, by the tokens that each reads."""
    return max(1, math.ceil(sample_tokens * _FORWARD / (_SHARE * step_tokens)))


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


@dataclass(frozen=True, slots=True)
class Checked:
    """What a measurement led to.

    Attributes:
        harm: on the steering samples, as the parameters are now.
        scale: by which the whole update was scaled for that; 1 where it was below the limit.
    """

    harm: float
    scale: float


class HarmControl:
    """Measures the harm of a training, and keeps it below a limit.

    Args:
        loaded: the model that is trained.
        updates: what is trained, as it is at the base.
        samples: of the base.
        every: steps between measurements.
        limit: nats a token, 0 to measure only; None for what the model has as it is now, and `ADDED`.
        autocast: makes the context that the model computes in.
        world: the processes that share the work.
        named: what is kept of texts that were protected by name, to report on.

    Attributes:
        limit: that holds, None where there is none.
        losses: what gives the losses of samples that are looked at again and again, if a training has its own way.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        updates: Updates,
        samples: Samples,
        every: int,
        limit: float | None,
        autocast: Callable[[], AbstractContextManager[object]],
        world: World,
        named: Sequence[Protected] = (),
    ) -> None:
        self._named = named
        self._loaded = loaded
        self._updates = updates
        self._samples = samples
        self._autocast = autocast
        # Where processes divide a model they compute every pass together, so all of them read all samples.
        self._world = ALONE if loaded.stream is not None and loaded.stream.divided else world
        self.every = every
        self.losses: LossesOf | None = None
        self.limit: float | None = limit or None
        if limit is None:
            began = self._steering()
            self.limit = max(0.0, began) + ADDED if math.isfinite(began) else None
        kept = updates.extra if self.limit is not None else {}
        self._base = {name: value.detach().cpu().clone() for name, value in kept.items()}

    def due(self, done: int, total: int, evaluates: bool) -> bool:
        """Whether to measure after a step; what is evaluated may be kept, so it has to satisfy a limit."""
        return done % self.every == 0 or done == total or (evaluates and self.limit is not None)

    def check(self) -> Checked:
        """Measures, and scales the update back where harm is above the limit."""
        harm = self._steering()
        if self.limit is None or not self.limit < harm < math.inf:
            return Checked(harm, 1.0)
        scale, harm = largest_scale(self._harm_at(), harm, self.limit)
        return Checked(harm, scale)

    def _harm_at(self) -> Callable[[float], float]:
        """Scales the update as it is now, and measures."""
        now = 1.0

        def harm_at(scale: float) -> float:
            nonlocal now
            self._updates.scale(scale / now, self._base)
            now = scale
            return self._steering()

        return harm_at

    def final(self, steering: float | None) -> tuple[float, Harm, tuple[NamedHarm, ...]]:
        """Of the model as it is: on the steering samples, on those that no step depended on, and what became of every name.

        Args:
            steering: what the last step's check found, where that is the model as it is.
        """
        if steering is None:
            steering = self._steering()
        reporting = self._measure(self._samples.reporting)
        loaded = self._loaded
        with self._autocast():
            named = [measure_protected(loaded.model, each, loaded.device, pad_id=loaded.pad_id) for each in self._named]
        return steering, reporting, tuple(named)

    def _steering(self) -> float:
        """Of the samples that are looked at again and again."""
        return self._measure(self._samples.steering, self.losses).nats

    def _measure(self, samples: tuple[Sample, ...], losses: LossesOf | None = None) -> Harm:
        loaded = self._loaded
        with self._autocast():
            return measure_harm(
                loaded.model, samples, loaded.device, pad_id=loaded.pad_id, world=self._world, losses=losses
            )
