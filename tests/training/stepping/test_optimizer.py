"""Clipping: what gradients are divided by."""

import pytest
import torch

from sculptor.training.stepping.clipping import divisor


@pytest.mark.parametrize("limit", [0.1, 1.0, 100.0])
def test_gradients_are_clipped_as_torch_does(limit: float, generator: torch.Generator) -> None:
    gradient = torch.randn(100, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], limit)
    torch.testing.assert_close(gradient / divisor(norm, limit), parameter.grad, rtol=1e-12, atol=0)


def test_a_small_gradient_stays_as_it_is() -> None:
    assert divisor(torch.tensor(0.5), 1.0) == 1
    assert divisor(torch.tensor(0.0), 1.0) == 1
