"""Gradients that a rule reads a side of before they are summed: the same coordinates as of a full one, and less to do."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sculptor.methods.lowrank import LowRankRule
from sculptor.methods.rule import Narrowed, Narrowing, OuterProduct, Tensors, Working, dense
from sculptor.methods.sides import Side
from sculptor.methods.staircase import StaircaseRule
from sculptor.numerics.free_space import MANY_TOKENS, Order, multiplications

CPU = torch.device("cpu")
M, N = 48, 32
RULES: dict[str, Any] = {
    "double, half": StaircaseRule((M, N), ((16, N), (M, 16)), Side("leading", 16), Side("free", 16)),
    "double, most": StaircaseRule((M, N), ((38, N), (M, 25)), Side("free", 38), Side("free", 25)),
    "few kept": StaircaseRule((M, N), ((4, N), (M, 3)), Side("leading", 4), Side("leading", 3)),
    "input": StaircaseRule((M, N), ((M, 24),), None, Side("free", 24)),
    "outputs alone": StaircaseRule((M, N), ((40, N), (M, 0)), Side("free", 40)),
    "stairs": StaircaseRule((M, N), ((10, N), (30, 20), (M, 18)), Side("leading", 30), Side("leading", 20)),
    "all free": StaircaseRule((M, N), ((M, 0),)),
    "lowrank": LowRankRule((M, N), 5, opened=True),
}
each = pytest.mark.parametrize("name", RULES)


def prepared(rule: Any, generator: torch.Generator) -> Tensors:
    found = {}
    for name, shape in rule.stored().items():
        columns = torch.randn(*(size or 1 for size in shape), dtype=torch.float64, generator=generator)
        found[name] = torch.linalg.qr(columns)[0] if columns.ndim == 2 else columns
    return rule.prepare(found, Working(CPU, torch.float64)).tensors  # type: ignore[no-any-return]


def product(tokens: int, generator: torch.Generator) -> OuterProduct:
    drawn = (torch.randn(tokens, size, dtype=torch.float64, generator=generator) for size in (N, M))
    return OuterProduct(*drawn)


@each
@pytest.mark.parametrize("tokens", [1, 7, 40, 4000])
def test_coordinates_are_those_of_a_full_gradient(name: str, tokens: int, generator: torch.Generator) -> None:
    rule, given = RULES[name], product(tokens, generator)
    tensors = prepared(rule, generator)
    full = given.outputs.T @ given.inputs
    (expected,) = rule.project(torch.empty(0), tensors, [], full)
    (found,) = rule.project(torch.empty(0), tensors, [], given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert found.is_contiguous()


@each
def test_a_side_that_was_read_before_is_read_the_same(name: str, generator: torch.Generator) -> None:
    rule, given = RULES[name], product(20, generator)
    tensors = prepared(rule, generator)
    (expected,) = rule.project(torch.empty(0), tensors, [], dense(given))
    for side in [side for side in ("output", "input") if getattr(rule, side, None)]:
        shape, taken = rule.narrowing(side)
        assert {key: tuple(tensors[key].shape) for key in taken} == dict(taken)
        for gradient in (given, dense(given)):
            narrowed = rule.narrow({key: tensors[key] for key in taken}, gradient, side)
            assert tuple(narrowed.values.shape) == shape
            (found,) = rule.project(torch.empty(0), tensors, [], narrowed)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@each
def test_the_order_is_the_one_that_multiplies_least(name: str) -> None:
    rule = RULES[name]
    for tokens in (1, 40, 4000):
        costs = rule.multiplications(tokens)
        assert costs[rule.order(tokens)] == min(costs.values())


def test_low_rank_needs_its_directions_alone(generator: torch.Generator) -> None:
    rule, given = RULES["lowrank"], product(20, generator)
    tensors = prepared(rule, generator)
    shape, taken = rule.narrowing("input")
    assert (shape, taken) == ((M, 5), {"directions": (N, 5)})
    for gradient in (given, dense(given)):
        narrowed = rule.narrow({key: tensors[key] for key in taken}, gradient, "input")
        assert tuple(narrowed.values.shape) == shape
        (found,) = rule.project(torch.empty(0), tensors, [], narrowed)
        torch.testing.assert_close(found, dense(given) @ tensors["directions"], rtol=0, atol=1e-10)


@each
@pytest.mark.parametrize("tokens", [2, 30, 400])
def test_the_order_that_is_taken_does_the_least(
    name: str, tokens: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in what torch multiplies."""
    rule, given = RULES[name], product(tokens, generator)
    if not isinstance(rule, StaircaseRule):
        return
    tensors, chosen = prepared(rule, generator), rule.order(tokens)
    counts: dict[Order, int] = {}
    possible: list[Order] = ["after", "both", *(side for side in ("output", "input") if getattr(rule, side))]
    for order in possible:
        monkeypatch.setattr(StaircaseRule, "order", lambda self, tokens, order=order: order)
        with FlopCounterMode(display=False) as counter:
            rule.project(torch.empty(0), tensors, [], given)
        counts[order] = counter.get_total_flops()
    assert counts[chosen] <= 1.02 * min(counts.values()), (chosen, counts)


def test_half_of_a_wide_matrix_is_read_on_its_narrow_side() -> None:
    """Llama-2-7B at 0.5: what is fewer is turned, the other side when the rows are summed."""
    for shape, expected in (((4096, 4096), "input"), ((11008, 4096), "input"), ((4096, 11008), "output")):
        k = min(shape) // 2
        first = (k, k)
        turns = tuple(d * (d - k) if d - k <= k else k * (d + k + d - k) for d in shape)
        for tokens in (4096, 16384, MANY_TOKENS):
            costs = multiplications(tokens, shape, first, (turns[0], turns[1]))
            order = min(costs, key=costs.__getitem__)
            assert order == expected or (tokens == 4096 and order == "both")


def test_a_narrowed_gradient_is_no_full_one(generator: torch.Generator) -> None:
    with pytest.raises(TypeError, match="narrowed"):
        dense(Narrowed(torch.zeros(2, 2), "input"))
    assert all(isinstance(rule, Narrowing) for rule in RULES.values())
