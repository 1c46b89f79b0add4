"""Staircases against their definition, pair by pair."""

import pytest
import torch

from sculptor.numerics.staircase import Constraint, Staircase


def frozen_mask(constraint: Constraint, m: int, n: int, k: int) -> torch.Tensor:
    """The definition: which (output, input) pairs are frozen."""
    output = torch.arange(m)[:, None] < k
    input = torch.arange(n)[None] < k
    return {
        "double": output | input,
        "input": input.expand(m, n),
        "core": output & input,
    }[constraint]


def mask_of(staircase: Staircase) -> torch.Tensor:
    mask = torch.zeros(staircase.rows, staircase.columns, dtype=torch.bool)
    for start, stop, reach in staircase.groups:
        mask[start:stop, :reach] = True
    return mask


@pytest.mark.parametrize("constraint", ["double", "input", "core"])
@pytest.mark.parametrize(("m", "n", "k"), [(6, 9, 3), (9, 6, 5), (4, 4, 0), (3, 8, 3), (1, 1, 0)])
def test_constraints_freeze_what_they_say(constraint: Constraint, m: int, n: int, k: int) -> None:
    staircase = Staircase.of(constraint, m, n, k, k)
    expected = frozen_mask(constraint, m, n, k)
    assert torch.equal(mask_of(staircase), expected)
    assert staircase.num_frozen == int(expected.sum())
    assert staircase.num_free == int((~expected).sum())
    assert staircase.frozen_share == pytest.approx(float(expected.double().mean()))
    assert staircase.inputs <= n
    assert staircase.outputs <= m


def test_free_shares_are_those_of_the_table() -> None:
    shares = {c: Staircase.of(c, 100, 100, 80, 80).num_free / 100**2 for c in ("core", "input", "double")}
    assert shares == {"core": 0.36, "input": 0.2, "double": 0.04}


def test_uneven_sides_and_closed() -> None:
    assert Staircase.of("double", 6, 8, 2, 3).steps == ((2, 8), (6, 3))
    assert Staircase.of("double", 6, 8, 2, 0).steps == ((2, 8), (6, 0))
    assert Staircase.closed(6, 8).num_free == 0
    assert Staircase.of("input", 6, 8, 0, 0).steps == ((6, 0),)


@pytest.mark.parametrize("steps", [(), ((3, 1),), ((2, 1), (6, 2)), ((6, 9),), ((0, 3), (6, 1)), ((4, 1), (2, 0))])
def test_steps_must_descend(steps: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="steps"):
        Staircase(6, 8, steps)
