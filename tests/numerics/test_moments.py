"""Truncated moments and the staircases derived from them, against dense float64 references."""

import pytest
import torch
from conftest import frozen_norm

from sculptor.numerics.allocation import Importance, allocate, least_free_share
from sculptor.numerics.bases import Basis
from sculptor.numerics.moments import Factor, add_symmetric, curvature, mirror, truncate


def unit_trace(moment: torch.Tensor) -> torch.Tensor:
    """The moment over its trace, float64."""
    return moment.double() / moment.double().trace()


def moment(d: int, generator: torch.Generator, decay: float = 1.5) -> torch.Tensor:
    """A random covariance whose eigenvalues fall like a trained model's."""
    q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    return (q * values) @ q.T


@pytest.mark.parametrize("k", [0, 3, 12])
def test_truncation_keeps_leading_directions_and_the_trace(k: int, generator: torch.Generator) -> None:
    full = moment(12, generator)
    factor = truncate(full, k)
    assert factor.trace == pytest.approx(float(full.trace()), rel=1e-12)
    torch.testing.assert_close(factor.vectors.T @ factor.vectors, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(factor.dense() @ factor.vectors, full @ factor.vectors, atol=1e-12, rtol=0)
    again = truncate(factor.dense(), k)
    torch.testing.assert_close(again.dense(), factor.dense(), atol=1e-12, rtol=0)
    if k == 12:
        torch.testing.assert_close(factor.dense(), full, atol=1e-12, rtol=0)
    assert factor.spectrum().numel() == 12


def test_a_broken_moment_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="square"):
        truncate(torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="NaN"):
        truncate(torch.full((3, 3), float("nan")), 1)


def test_sources_of_unit_trace_add(generator: torch.Generator) -> None:
    a, b = moment(10, generator), 7 * moment(10, generator)
    found = truncate(unit_trace(a) + 2 * unit_trace(b), 10)
    assert found.trace == pytest.approx(3.0)
    torch.testing.assert_close(found.dense(), a / a.trace() + 2 * b / b.trace(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [2, 6])
def test_curvature_is_the_trace(k: int, generator: torch.Generator) -> None:
    output, input = truncate(moment(6, generator), k), truncate(moment(9, generator), k)
    update = torch.randn(6, 9, dtype=torch.float64, generator=generator)
    g, c = output.dense(), input.dense()
    assert curvature(update, output, input) == pytest.approx(float((g @ update @ c @ update.T).trace()), rel=1e-10)
    assert curvature(update, None, input) == pytest.approx(float((update @ c @ update.T).trace()), rel=1e-10)


def importance_of(output: Factor | None, input: Factor, rows: int, scale: float = 1.0) -> Importance:
    return Importance(
        rows,
        output.spectrum() if output else None,
        input.spectrum(),
        output.values.numel() if output else 0,
        input.values.numel(),
        scale,
    )


@pytest.mark.parametrize("budget", [0.5, 0.61, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_budget_is_the_actual_free_share(budget: float, steps: int, generator: torch.Generator) -> None:
    found = importance_of(truncate(moment(64, generator), 32), truncate(moment(96, generator), 48), 64)
    (staircase,) = allocate([found], budget, steps)
    assert budget <= 1 - staircase.frozen_share + 1e-9 <= budget + 64 / (64 * 96) * 1.01
    assert len(staircase.steps) <= steps


def test_a_common_threshold_gives_more_to_what_matters_less(generator: torch.Generator) -> None:
    factors = truncate(moment(32, generator), 32), truncate(moment(32, generator), 32)
    matrices = [importance_of(*factors, 32, scale) for scale in (1.0, 100.0)]
    first, second = allocate(matrices, 0.5)
    assert first.num_free > 1.5 * second.num_free
    assert (first.num_free + second.num_free) / 2048 == pytest.approx(0.5, abs=0.02)


def test_too_small_a_budget_is_refused(generator: torch.Generator) -> None:
    found = importance_of(truncate(moment(32, generator), 8), truncate(moment(32, generator), 8), 32)
    assert least_free_share([found]) == pytest.approx(0.75**2)  # neither row nor column is stored
    with pytest.raises(ValueError, match=r"0\.562"):
        allocate([found], 0.5)


def test_inputs_alone_freeze_whole_columns(generator: torch.Generator) -> None:
    (staircase,) = allocate([importance_of(None, truncate(moment(40, generator), 20), 16)], 0.6)
    assert staircase.steps == ((16, 16),)


def test_a_few_steps_from_truncated_factors_protect_nearly_all(generator: torch.Generator) -> None:
    """At least 95 % of the curvature that the exact threshold on full factors protects, at the same free share."""
    g, c = moment(128, generator, 1.0), moment(192, generator, 1.2)
    exact = torch.outer(torch.linalg.eigvalsh(g).flip(0), torch.linalg.eigvalsh(c).flip(0)).flatten()
    best = float(exact.sort(descending=True).values[: round(0.39 * exact.numel())].sum() / exact.sum())
    found = importance_of(truncate(g, 64), truncate(c, 96), 128)
    (staircase,) = allocate([found], 0.61)
    assert found.protected_share(staircase) > 0.97 * best
    assert found.protected_share(staircase) <= best + 1e-9


def test_protected_share_is_what_the_frozen_pairs_hold(generator: torch.Generator) -> None:
    output, input = truncate(moment(16, generator), 16), truncate(moment(24, generator), 24)
    found = importance_of(output, input, 16)
    (staircase,) = allocate([found], 0.5)
    root = output.dense(), input.dense()
    total = 0.0
    for i in range(16):
        for j in range(24):
            pair = torch.outer(output.vectors[:, i], input.vectors[:, j])
            if frozen_norm(pair, staircase, Basis(output.vectors, "leading"), Basis(input.vectors, "leading")) > 0.5:
                total += float((root[0] @ pair @ root[1] @ pair.T).trace())
    assert found.protected_share(staircase) == pytest.approx(total / (root[0].trace() * root[1].trace()).item())


@pytest.mark.parametrize("d", [1, 5, 255, 513, 2100])
def test_a_symmetric_product_is_the_whole_product(d: int) -> None:
    """Half of it and its mirror image against all of it in float64: weighted rows, none too, of widths that no band divides."""
    generator = torch.Generator().manual_seed(d)
    total = torch.zeros(d, d)
    expected = torch.zeros(d, d, dtype=torch.float64)
    for count in (7, 0, 3):
        rows = torch.randn(count, d, generator=generator)
        weights = torch.rand(count, 1, generator=generator)
        add_symmetric(total, rows * weights, rows)
        expected += (rows * weights).double().T @ rows.double()
    mirror(total)
    torch.testing.assert_close(total, total.T)
    assert float((total - expected).norm()) <= 1e-6 * float(expected.norm())
    again = total.clone()
    mirror(again)
    assert torch.equal(again, total)
