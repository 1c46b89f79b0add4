"""Bayesian gradient descent's sigma: the published formula in float64, and what Stein's identity puts into it."""

import pytest
import torch

from sculptor.numerics.posterior import gain_, shares


def test_precision_follows_the_published_formula(generator: torch.Generator) -> None:
    gradients = torch.randn(20, 50, generator=generator, dtype=torch.float64) * 3
    sigma_0, samples = 0.3, 7.0
    sigma = torch.full((50,), sigma_0, dtype=torch.float64)
    precision = torch.zeros(50, dtype=torch.float64)
    for g in gradients:
        e = sigma * samples * g**2  # E[g eps] = sigma h
        sigma = sigma * torch.sqrt(1 + (sigma * e / 2) ** 2) - sigma**2 * e / 2
        gain_(precision, g, sigma_0**2 * samples)
        torch.testing.assert_close(shares(precision), (sigma / sigma_0) ** 2, rtol=1e-12, atol=0)


def test_a_sample_of_g_eps_is_sigma_h_on_average(generator: torch.Generator) -> None:
    """What a step's formula asks for, of a quadratic loss, by 100,000 samples."""
    h, sigma = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64), 0.3
    eps = torch.randn(100_000, 3, generator=generator, dtype=torch.float64)
    g = h * (torch.ones(3) + sigma * eps)
    torch.testing.assert_close((g * eps).mean(0), sigma * h, rtol=0.05, atol=0.01)


def test_sigma_falls_where_data_were_seen_and_nowhere_else() -> None:
    gradient = torch.tensor([0.0, 1e-6, 1e-3, 1.0, 10.0])
    precision = torch.zeros(5)
    last = shares(precision)
    for _ in range(5):
        gain_(precision, gradient, 1.0)
        found = shares(precision)
        assert found[0] == 1
        assert bool((found[2:] < last[2:]).all())
        assert precision[1] > 0  # beside 1 it would be lost
        assert bool((found > 0).all())
        last = found


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_no_gradient_says_nothing(value: float) -> None:
    precision = torch.full((2, 3), value)
    gain_(precision, torch.zeros(2, 3), 5.0)
    assert bool((precision == value).all())
    gain_(precision[:0], torch.zeros(0, 3), 5.0)
