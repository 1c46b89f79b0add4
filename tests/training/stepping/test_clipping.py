"""What gradients are divided by, against torch's own clipping."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sculptor.training.stepping.clipping import clip, divisor


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


def waiting(generator: torch.Generator) -> tuple[Any, dict[str, torch.Tensor]]:
    """A block with gradients of two matrices, one of which has two coordinates; none has reached a third."""
    gradients = {name: torch.randn(5, generator=generator, dtype=torch.float64) for name in ("a.A0", "a.A1", "b.A0")}
    matrices = [
        SimpleNamespace(name="a", keys=["a.A0", "a.A1"], touched=True),
        SimpleNamespace(name="b", keys=["b.A0"], touched=True),
        SimpleNamespace(name="c", keys=["c.A0"], touched=False),
    ]
    return SimpleNamespace(matrices=matrices, norms={key: g.norm() for key, g in gradients.items()}), gradients


@pytest.mark.parametrize("apart", [False, True])
def test_what_waits_and_what_is_on_the_device_are_clipped_alike(apart: bool, generator: torch.Generator) -> None:
    block, gradients = waiting(generator)
    own = torch.randn(7, generator=generator, dtype=torch.float64)
    together = torch.cat([*gradients.values(), own])
    groups = (
        [[*gradients.values(), own]]
        if not apart
        else [[gradients["a.A0"], gradients["a.A1"]], [gradients["b.A0"]], [own]]
    )
    expected = []
    for group in groups:
        parameters = [torch.nn.Parameter(g) for g in group]
        for parameter, g in zip(parameters, group, strict=True):
            parameter.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        expected += [parameter.grad for parameter in parameters]
    found = own.clone()
    divisors = clip([block], [found], [own.norm()], together.norm(), 0.5, apart)
    clipped = [g / divisors.of(name[0]) for name, g in gradients.items()]
    for one, other in zip([*clipped, found], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
    assert divisors.on_cpu().of("a") == divisors.of("a")
    if apart:
        assert divisors.whole is None
        assert divisors.by_matrix.keys() == {"a", "b"}


def test_no_limit_divides_nothing(generator: torch.Generator) -> None:
    block, _ = waiting(generator)
    own = torch.ones(3)
    divisors = clip([block], [own], [own.norm()], own.norm(), 0.0, apart=False)
    assert own.tolist() == [1.0] * 3
    assert divisors.of("a") is None
    assert divisors.on_cpu().of("a") is None
