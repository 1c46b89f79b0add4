"""What analysis protects of one matrix."""

import pytest
import torch
from conftest import frozen_norm

from sculptor.methods.weights import analyze_matrix
from sculptor.numerics.bases import protected_directions
from sculptor.numerics.staircase import Constraint


@pytest.mark.parametrize("constraint", ["double", "input", "core"])
@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_the_leading_part_of_the_matrix_is_frozen(
    constraint: Constraint, shape: tuple[int, int], generator: torch.Generator
) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    found = analyze_matrix(weight, constraint, 5)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    leading = (u[:, :5] * s[:5]) @ vh[:5]
    frozen = frozen_norm(leading, found.staircase, found.output, found.input)
    assert frozen == pytest.approx(float(leading.norm()), rel=1e-10)
    rest = frozen_norm(weight - leading, found.staircase, found.output, found.input)
    assert rest < 1e-9
    assert found.energy == pytest.approx(float(s[:5].square().sum() / s.square().sum()), rel=1e-10)
    assert (found.output is None) == (constraint == "input")
    assert found.input is not None
    assert protected_directions(found.input).shape == (shape[1], 5)


def test_nothing_is_stored_at_0_and_zero_matrices_do_not_fail() -> None:
    assert analyze_matrix(torch.ones(3, 4), "double", 0).input is None
    assert analyze_matrix(torch.zeros(3, 4), "double", 2).energy == 1.0
