"""Stored sides and the frozen norm, against dense float64 references."""

import pytest
import torch
from conftest import frozen_norm
from numerics.sides import CASES, orthonormal, sides

from sculptor.numerics.bases import (
    Basis,
    extend,
    frozen_variance,
    protected_directions,
    store_smaller,
)
from sculptor.numerics.linalg import complement
from sculptor.numerics.staircase import Constraint, Staircase


def frozen_reference(update: torch.Tensor, constraint: Constraint, u: torch.Tensor, v: torch.Tensor) -> float:
    """The frozen part by the constraint's own equation."""
    pu, pv = u @ u.T, v @ v.T
    parts = {
        "input": update @ pv,
        "core": pu @ update @ pv,
        "double": pu @ update + update @ pv - pu @ update @ pv,
    }
    return float(parts[constraint].norm())


@pytest.mark.parametrize(("constraint", "m", "n", "k"), CASES)
def test_frozen_norm_equals_the_equation(
    constraint: Constraint, m: int, n: int, k: int, generator: torch.Generator
) -> None:
    output, input = sides(constraint, m, n, k, generator)
    update = torch.randn(m, n, dtype=torch.float64, generator=generator)
    u = protected_directions(output) if output else torch.zeros(m, 0, dtype=torch.float64)
    v = protected_directions(input) if input else torch.zeros(n, 0, dtype=torch.float64)
    found = frozen_norm(update, Staircase.of(constraint, m, n, k, k), output, input)
    assert found == pytest.approx(frozen_reference(update, constraint, u, v), rel=1e-10, abs=1e-12)


def test_smaller_form_is_stored() -> None:
    eye = torch.eye(10, dtype=torch.float64)
    assert store_smaller(eye[:, :5]).form == "leading"
    assert store_smaller(eye[:, :6]).form == "free"
    assert store_smaller(eye[:, :6]).directions == 6
    assert store_smaller(eye[:, :6]).vectors.shape == (10, 4)


@pytest.mark.parametrize("k", [0, 2, 6, 8])
def test_extend_keeps_the_old_span_and_adds_the_new(k: int, generator: torch.Generator) -> None:
    old = orthonormal(10, k, generator)
    new = torch.randn(10, 2, dtype=torch.float64, generator=generator)
    basis = store_smaller(old) if k else None
    grown = extend(basis, new, single_cut=True)
    assert grown is not None
    assert grown.directions == min(10, k + 2)
    span = protected_directions(grown)
    projector = span @ span.T
    torch.testing.assert_close(projector @ old, old, atol=1e-10, rtol=0)
    torch.testing.assert_close(projector @ new, new, atol=1e-10, rtol=0)
    torch.testing.assert_close(projector @ projector, projector, atol=1e-10, rtol=0)


def test_extend_ignores_what_is_protected_already(generator: torch.Generator) -> None:
    old = orthonormal(10, 3, generator)
    grown = extend(Basis(old, "leading"), old[:, :2], single_cut=False)
    assert grown is not None
    assert grown.directions == 3
    assert extend(None, old[:, :0], single_cut=True) is None


def test_complement_of_free_form_is_what_is_protected(generator: torch.Generator) -> None:
    leading = orthonormal(9, 7, generator)
    basis = store_smaller(leading)
    span = protected_directions(basis)
    torch.testing.assert_close(span @ span.T, leading @ leading.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        complement(span) @ complement(span).T, basis.vectors @ basis.vectors.T, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("constraint", "m", "n", "k"), CASES)
def test_frozen_variance_is_the_expectation(
    constraint: Constraint, m: int, n: int, k: int, generator: torch.Generator
) -> None:
    """Errors are independent, so their frozen energies add up entry by entry."""
    output, input = sides(constraint, m, n, k, generator)
    staircase = Staircase.of(constraint, m, n, k, k)
    variance = torch.rand(m, n, dtype=torch.float64, generator=generator)
    expected = 0.0
    for i in range(m):
        for j in range(n):
            one = torch.zeros(m, n, dtype=torch.float64)
            one[i, j] = 1.0
            expected += float(variance[i, j]) * frozen_norm(one, staircase, output, input) ** 2
    assert frozen_variance(variance, staircase, output, input) == pytest.approx(expected, abs=1e-12)
