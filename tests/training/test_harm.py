"""The control of harm: how far an update is scaled back, and how often that is looked at."""

import math
from collections.abc import Callable

import pytest

from sculptor.training.harm import largest_scale, steps_between

RAYS: dict[str, Callable[[float], float]] = {
    "parabola": lambda s: 0.8 * s * s,
    "line": lambda s: 0.3 * s,
    "steep": lambda s: math.exp(6 * s) - 1,
    "saturating": lambda s: 1 - math.exp(-40 * s * s),
    "two regimes": lambda s: 0.01 * s + 5 * max(0.0, s - 0.6) ** 2,
}


@pytest.mark.parametrize("limit", [1e-3, 0.02, 0.15])
@pytest.mark.parametrize("ray", RAYS)
def test_the_scale_satisfies_the_limit_and_is_nearly_the_largest(ray: str, limit: float) -> None:
    harm, asked = RAYS[ray], []

    def harm_at(scale: float) -> float:
        asked.append(scale)
        return harm(scale)

    scale, found = largest_scale(harm_at, harm(1.0), limit)
    assert 0 < scale < 1
    assert found == harm(scale) <= limit
    assert asked[-1] == scale, "what was measured last is what is in place"
    assert len(asked) <= 9
    assert harm(min(1.0, scale * 1.6)) > limit, "no much larger one would do"
    if ray == "parabola":
        assert len(asked) == 1
        assert found == pytest.approx(0.975 * limit)
    assert largest_scale(harm, harm(1.0), limit) == (scale, found)


def test_a_ray_that_never_gets_below_ends_at_nothing() -> None:
    asked = []

    def jumps(scale: float) -> float:
        asked.append(scale)
        return 1.0 if scale > 0 else 0.0

    assert largest_scale(jumps, 1.0, 0.1) == (0.0, 0.0)
    assert asked[-1] == 0


def test_measuring_takes_a_twentieth_of_the_time_at_most() -> None:
    for samples, step in ((4096, 1300.0), (4096, 16384.0), (100, 1e6)):
        every = steps_between(samples, step)
        assert every >= 1
        assert samples / 3 <= 0.05 * every * step + 1e-9
        assert every == 1 or samples / 3 > 0.05 * (every - 1) * step, "and no more seldom than that"
