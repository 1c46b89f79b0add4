"""LiNeS and WiSE-FT against their formulas in float64."""

import pytest
import torch

from sculptor.checkpoint.places import Place
from sculptor.edits.difference import Where
from sculptor.edits.interpolate import Even, interpolate
from sculptor.edits.lines import Layered, lines, scaling


def test_the_scaling_is_a_line() -> None:
    count = 5
    for alpha, beta in ((0.3, None), (0.2, 0.5), (0.0, 0.0), (1.0, None)):
        slope = 1 - alpha if beta is None else beta
        found = [scaling(layer / (count - 1), alpha, beta) for layer in range(count)]
        assert found == pytest.approx([alpha + slope * layer / (count - 1) for layer in range(count)], abs=1e-15)
        assert scaling(None, alpha, beta) == alpha


@pytest.mark.parametrize("alpha", [i / 10 for i in range(11)])
def test_the_last_block_keeps_everything_by_default(alpha: float, generator: torch.Generator) -> None:
    base, tuned = (torch.randn(4, 4, generator=generator) for _ in range(2))
    assert scaling(1.0, alpha) == 1
    assert torch.equal(lines(base, tuned, 1.0, alpha).float(), tuned)


def test_both_are_the_formula(generator: torch.Generator) -> None:
    base, tuned = (torch.randn(6, 3, generator=generator) for _ in range(2))
    difference = tuned.double() - base.double()
    torch.testing.assert_close(lines(base, tuned, 0.5, 0.2, 0.6), base + 0.5 * difference, atol=1e-15, rtol=0)
    torch.testing.assert_close(interpolate(base, tuned, 0.3), base + 0.3 * difference, atol=1e-15, rtol=0)
    for end, expected in ((0.0, base), (1.0, tuned)):
        assert torch.equal(interpolate(base, tuned, end).float(), expected)
        assert torch.equal(lines(base, tuned, 0.7, end, 0.0).float(), expected)


def test_the_edits_take_the_place() -> None:
    for depth in (None, 0.0, 0.25, 1.0):
        where = Where("w", None, Place("w", "w", depth))
        assert Layered(0.3, 0.4).factor(where) == scaling(depth, 0.3, 0.4)
        assert Even(0.3).factor(where) == 0.3
