"""AdamW as it is set up here, against its formula in float64; and its state by name."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

from sculptor import TrainSettings
from sculptor.training.stepping import optimizer as module
from sculptor.training.stepping.optimizer import (
    BETAS,
    Group,
    join_groups,
    kept_bytes,
    load_state,
    make_optimizer,
    optimizer_on_host,
    set_rates,
    with_state,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = TrainSettings(device="cpu")
SHAPES = {"a": (3, 2), "b": (4,), "c": (5,)}


def made(
    generator: torch.Generator, settings: TrainSettings = SETTINGS
) -> tuple[dict[str, nn.Parameter], module.AdamW]:
    named = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    groups = [Group([named["a"], named["b"]], 1e-2, 0.1), Group([named["c"]], 1e-3), Group([], 1.0)]
    return named, make_optimizer(groups, CPU, settings, 15)


def step(named: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for a in named.values():
        a.grad = torch.randn(a.shape, generator=generator)
    set_rates(optimizer, lambda peak: peak / (number + 1))
    optimizer.step()


def formula(name: str, number: int, gradient: Any, value: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
    """A step of one parameter in float64, as Loshchilov and Hutter have it."""
    peak, decay = (1e-3, 0.0) if name == "c" else (1e-2, 0.1)
    rate, g = peak / (number + 1), gradient.double()
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
    first, second = (x / (1 - beta ** (number + 1)) for x, beta in zip((m, v), BETAS, strict=True))
    return value * (1 - rate * decay) - rate * first / (second.sqrt() + 1e-8), m, v


def test_it_is_the_formula(generator: torch.Generator) -> None:
    """The decay apart from the gradient, both times the step's rate, which is of each group's peak."""
    named, optimizer = made(generator)
    assert len(optimizer.param_groups) == 2, "a group of nothing is none"
    state = {name: (a.detach().double(), *[torch.zeros(a.shape, dtype=torch.float64)] * 2) for name, a in named.items()}
    for number in range(3):
        step(named, optimizer, number)
        for name, before in state.items():
            state[name] = formula(name, number, named[name].grad, *before)
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


NARROW = replace(SETTINGS, optimizer_dtype="bfloat16")


def test_moments_in_bfloat16_are_the_formula_rounded(generator: torch.Generator) -> None:
    """A step reads them as they were rounded after the step before."""
    named, optimizer = made(generator, NARROW)
    state = {name: (a.detach().double(), *[torch.zeros(a.shape, dtype=torch.float64)] * 2) for name, a in named.items()}
    for number in range(5):
        step(named, optimizer, number)
        for name, before in state.items():
            value, m, v = formula(name, number, named[name].grad, *before)
            torch.testing.assert_close(named[name].detach().double(), value, rtol=1e-5, atol=1e-7)
            kept = [optimizer.state[named[name]][moment] for moment in module.MOMENTS]
            assert [moment.dtype for moment in kept] == [torch.bfloat16] * 2
            for moment, exact in zip(kept, (m, v), strict=True):
                torch.testing.assert_close(moment.double(), exact, rtol=2**-8 + 1e-6, atol=1e-12)
            state[name] = value, kept[0].double(), kept[1].double()
    assert float(optimizer.state[named["a"]]["step"]) == 5


def test_averages_in_bfloat16_do_not_stall(generator: torch.Generator) -> None:
    """They end within 4 and 8 % of where gradients that stay, and then others, bring them."""
    a = nn.Parameter(torch.zeros(4096))
    optimizer = make_optimizer([Group([a], 1e-3)], CPU, NARROW, 4096)
    for size in (1.0, 0.03, 5.0):
        gradient = size * (0.1 + torch.rand(4096, generator=generator))
        for _ in range(400):
            a.grad = gradient.clone()
            optimizer.step()
        for moment, exact, most in zip(module.MOMENTS, (gradient, gradient**2), (0.04, 0.08), strict=True):
            kept = optimizer.state[a][moment].float()
            assert ((kept - exact).abs() <= most * kept + 1e-12).all()


@pytest.mark.parametrize("optimizer", ["adamw", "bayes-adam"])
def test_pieces_are_the_whole(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, optimizer: Literal["adamw", "bayes-adam"]
) -> None:
    """However parameters are cut and put together, bit for bit; what gradients are divided by is of all of them."""
    told = replace(NARROW, optimizer=optimizer, evidence=0.1 if optimizer == "bayes-adam" else None)
    found = []
    for size in (1000, 7, 4, 1):
        monkeypatch.setitem(module._PIECE, "cpu", size)
        named, stepped = made(torch.Generator().manual_seed(3), told)
        stepped.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
        for number in range(3):
            step(named, stepped, number)
        found.append({name: value.clone() for name, value in with_state(named, stepped).items()})
    plain, unscaled = made(torch.Generator().manual_seed(3), told)
    for number in range(3):
        step(plain, unscaled, number)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)
    kept = with_state(plain, unscaled)
    assert found[0]["a.exp_avg"].float().norm() == pytest.approx(float(kept["a.exp_avg"].float().norm()) / 4, rel=0.01)


def test_narrow_moments_are_saved_and_put_back(generator: torch.Generator) -> None:
    named, optimizer = made(generator, NARROW)
    step({"a": named["a"], "b": named["b"]}, optimizer, 0)
    saved = {name: value.detach().clone() for name, value in with_state(named, optimizer).items()}
    other, again = made(generator, NARROW)
    for name, a in other.items():
        a.data.copy_(saved[name])
    load_state(other, again, {name: v.float() for name, v in saved.items()})  # of wide ones: they are narrowed
    for parameters, by in ((named, optimizer), (other, again)):
        step(parameters, by, 1)
    assert all(
        torch.equal(value, with_state(other, again)[name]) for name, value in with_state(named, optimizer).items()
    )


def test_bytes_that_are_kept() -> None:
    found = [
        kept_bytes(replace(SETTINGS, optimizer_dtype=dtype, optimizer=optimizer))
        for dtype in ("float32", "bfloat16")
        for optimizer in ("adamw", "bayes-adam")
    ]
    assert found == [8, 12, 4, 8]
