"""AdamW as it is set up here, against its formula in float64; and its state by name."""

from typing import Any

import pytest
import torch
from torch import nn

from sculptor import TrainSettings
from sculptor.training.stepping.optimizer import (
    BETAS,
    Group,
    join_groups,
    load_state,
    make_optimizer,
    optimizer_on_host,
    set_rates,
    with_state,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = TrainSettings(device="cpu")
SHAPES = {"a": (3, 2), "b": (4,), "c": (5,)}


def made(generator: torch.Generator) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    named = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    groups = [Group([named["a"], named["b"]], 1e-2, 0.1), Group([named["c"]], 1e-3), Group([], 1.0)]
    return named, make_optimizer(groups, CPU, SETTINGS, 15)


def step(named: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for a in named.values():
        a.grad = torch.randn(a.shape, generator=generator)
    set_rates(optimizer, lambda peak: peak / (number + 1))
    optimizer.step()


def test_it_is_the_formula(generator: torch.Generator) -> None:
    """Loshchilov and Hutter: the decay apart from the gradient, both times the step's rate, which is of each group's peak."""
    named, optimizer = made(generator)
    assert len(optimizer.param_groups) == 2, "a group of nothing is none"
    state = {name: (a.detach().double(), *[torch.zeros(a.shape, dtype=torch.float64)] * 2) for name, a in named.items()}
    for number in range(3):
        step(named, optimizer, number)
        for name, (value, m, v) in state.items():
            peak, decay = (1e-3, 0.0) if name == "c" else (1e-2, 0.1)
            rate, gradient = peak / (number + 1), named[name].grad
            assert gradient is not None
            g = gradient.double()
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
            first, second = (x / (1 - beta ** (number + 1)) for x, beta in zip((m, v), BETAS, strict=True))
            state[name] = value * (1 - rate * decay) - rate * first / (second.sqrt() + 1e-8), m, v
            torch.testing.assert_close(named[name].detach().double(), state[name][0], rtol=1e-5, atol=1e-7)


def test_its_state_is_saved_and_put_back(generator: torch.Generator) -> None:
    """Bit for bit, also where no gradient ever reached a parameter."""
    named, optimizer = made(generator)
    step({"a": named["a"], "b": named["b"]}, optimizer, 0)
    saved = {name: value.detach().clone() for name, value in with_state(named, optimizer).items()}
    assert {name for name in saved if "." not in name} == set(SHAPES)
    assert not [name for name in saved if name.startswith("c.")]
    other, again = made(generator)
    for name, a in other.items():
        a.data.copy_(saved[name])
    load_state(other, again, saved)
    for parameters, by in ((named, optimizer), (other, again)):
        step(parameters, by, 1)
    assert all(torch.equal(named[name], other[name]) for name in SHAPES)


def test_groups_of_one_rate_are_one() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    found = join_groups([Group([a], 1e-2), Group([b], 1e-3), Group([c], 1e-2), Group([b], 1e-2, 0.1)])
    assert [([id(p) for p in group.parameters], group.peak, group.weight_decay) for group in found] == [
        ([id(a), id(c)], 1e-2, 0.0),
        ([id(b)], 1e-3, 0.0),
        ([id(b)], 1e-2, 0.1),
    ]


@pytest.mark.parametrize(
    ("changes", "tier", "device", "expected"),
    [
        ({}, "cpu", CUDA, True),
        ({}, "cpu", CPU, False),
        ({}, "disk", CUDA, False),
        ({"offload": "cpu", "optimizer_on": "host"}, "cpu", CPU, True),
        ({"offload": "cpu", "optimizer_on": "device"}, "cpu", CUDA, False),
        ({"offload": "cpu", "optimizer_mode": "fused", "clip": 0, "micro_batch_size": 16}, "cpu", CUDA, False),
    ],
)
def test_where_it_runs(changes: dict[str, Any], tier: str, device: torch.device, expected: bool) -> None:
    assert optimizer_on_host(TrainSettings(batch_size=16, **changes), tier, device) is expected
