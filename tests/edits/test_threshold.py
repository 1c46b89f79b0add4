"""The threshold on singular values against an SVD in float64, and on noise with a planted signal."""

import pytest
import torch

from sculptor.edits.threshold import Denoised, omega, threshold


def reference(difference: torch.Tensor) -> torch.Tensor:
    m, n = difference.shape
    u, s, vh = torch.linalg.svd(difference.double(), full_matrices=False)
    b = min(m, n) / max(m, n)
    tau = s.quantile(0.5) * (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43)
    return (u * torch.where(s < tau, 0.0, s)) @ vh


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (70, 30), (2, 9)])
def test_it_is_the_formula(shape: tuple[int, int], generator: torch.Generator) -> None:
    spikes = torch.randn(shape[0], 1, generator=generator) @ torch.randn(1, shape[1], generator=generator)
    difference = torch.randn(shape, generator=generator) + 3 * spikes
    torch.testing.assert_close(threshold(difference), reference(difference), atol=1e-10, rtol=0)


def test_omega_is_that_of_donoho_and_gavish() -> None:
    """Their table: 2.858 for square matrices, 1.5066 at 0.05 (arXiv 1305.5870, table IV); the fit is within 0.02."""
    assert omega(1.0) == pytest.approx(2.858, abs=0.02)
    assert omega(0.05) == pytest.approx(1.5194, abs=0.02)
    assert omega(0.5) == pytest.approx(2.1711, abs=0.02)


def test_a_planted_signal_stays_and_noise_goes(generator: torch.Generator) -> None:
    m, n, rank = 120, 200, 3
    u, v = (torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64))[0] for d in (m, n))
    noise = torch.randn(m, n, generator=generator, dtype=torch.float64) / n**0.5
    signal = u @ torch.diag(torch.tensor([20.0, 10.0, 5.0], dtype=torch.float64)) @ v.T
    found = threshold(signal + noise)
    assert int((torch.linalg.svdvals(found) > 1e-8).sum()) == rank
    assert float((found - signal).norm() / signal.norm()) < 0.15
    assert float((noise).norm() / signal.norm()) > 0.4
    assert float(threshold(noise).norm()) < 0.1 * float(noise.norm())


def test_a_difference_of_low_rank_stays(generator: torch.Generator) -> None:
    """The median is rounding then: what LoRA trained is above it."""
    difference = torch.randn(50, 4, generator=generator) @ torch.randn(4, 60, generator=generator)
    torch.testing.assert_close(threshold(difference), difference.double(), atol=1e-5, rtol=0)
    assert torch.equal(threshold(torch.zeros(4, 5)), torch.zeros(4, 5, dtype=torch.float64))


def test_only_matrices_have_a_threshold(generator: torch.Generator) -> None:
    edit = Denoised()
    for shape in ((7,), (), (1, 9), (9, 1), (3, 1, 4)):
        difference = torch.randn(shape, generator=generator, dtype=torch.float64)
        assert torch.equal(edit.kept(None, None, difference), difference)  # type: ignore[arg-type]
    assert edit.is_sliced("experts", (4, 8, 8))
    assert not edit.is_sliced("conv", (8, 1, 4))
    assert not edit.is_sliced("w", (8, 8))
