"""Rotations of the outputs: the formula inside of what is free, and what a task protects."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sculptor import AnalyzeSettings
from sculptor.methods.method import Derived, Evidence
from sculptor.methods.rotation import Rotation, RotationRule
from sculptor.methods.rule import Working, num_free
from sculptor.numerics.rotations import turn

CPU64 = Working(torch.device("cpu"), torch.float64)


def derive(weight: Tensor, **changes: Any) -> tuple[Rotation, Derived]:
    method = Rotation(AnalyzeSettings(rule="rotation", block_size=4, **changes))
    m, n = weight.shape
    return method, method.derive(Evidence("w", (m, n), lambda: weight))


def rule_of(derived: Derived) -> RotationRule:
    assert isinstance(derived.rule, RotationRule)
    return derived.rule


def update_of(found: Derived, weight: Tensor, generator: torch.Generator, scale: float = 0.3) -> Tensor:
    rule = rule_of(found)
    values = [scale * torch.randn(s, dtype=torch.float64, generator=generator) for s in rule.shapes]
    return rule.update(weight, rule.prepare(found.tensors, CPU64).tensors, values)


def finished(update: Tensor, task: int) -> Evidence:
    m, n = update.shape
    return Evidence("w", (m, n), lambda: torch.empty(0), update=update, task=task)


def off(found: Derived, weight: Tensor, update: Tensor) -> float:
    violation = rule_of(found).violation(found.tensors, weight, update, torch.zeros_like(weight))
    return violation.norm / float(update.norm())


@pytest.fixture(params=[(24, 40), (40, 24)], ids=["wide", "tall"])
def weight(request: pytest.FixtureRequest, generator: torch.Generator) -> Tensor:
    return torch.randn(*request.param, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("preserve", [0.0, 0.25, 0.7])
def test_lengths_angles_and_protected_outputs_stay(weight: Tensor, preserve: float, generator: torch.Generator) -> None:
    _, found = derive(weight, preserve=preserve)
    rule, k = rule_of(found), int(preserve * 24)
    assert rule.protected == k
    update = update_of(found, weight, generator)
    new = weight + update
    assert float(update.norm()) > 0.1 * float(weight.norm())
    torch.testing.assert_close(new.T @ new, weight.T @ weight)
    left = torch.linalg.svd(weight)[0][:, :k]
    assert float((left.T @ update).norm()) < 1e-12
    assert off(found, weight, update) < 1e-12
    assert off(found, weight, update + 0.01 * torch.randn_like(update)) > 1e-3


def test_inside_what_is_free_it_is_the_formula(weight: Tensor, generator: torch.Generator) -> None:
    """R = I + F (R' - I) F^T, with F as the rule completes U."""
    _, found = derive(weight, preserve=0.25)
    rule = rule_of(found)
    prepared = rule.prepare(found.tensors, CPU64).tensors
    values = [torch.randn(s, dtype=torch.float64, generator=generator) for s in rule.shapes]
    side = rule.output.restored("output", prepared, weight.shape[0]) if rule.output else None
    assert side is not None
    free = side.apply(torch.eye(rule.turned, dtype=torch.float64), rule.protected)
    expected = free @ turn(free.T @ weight, values, 4)
    torch.testing.assert_close(rule.update(weight, prepared, values), expected)
    torch.testing.assert_close(free.T @ free, torch.eye(rule.turned, dtype=torch.float64))


def test_kept_rules_turn_the_same_and_accumulated_ones_less(weight: Tensor, generator: torch.Generator) -> None:
    method, before = derive(weight)
    assert method.carries[0] == "keep"
    seen, now, found = [], weight, before
    for task in range(1, 4):
        update = update_of(found, now, generator)
        assert all(float((directions.T @ update).norm()) < 1e-10 for directions in seen)
        now = now + update
        carried = method.carry("accumulate", found, finished(update, task))
        assert rule_of(carried).protected > rule_of(found).protected
        assert num_free(carried.rule) < num_free(found.rule)
        assert carried.rule.figures().added[task][0] == rule_of(carried).protected - rule_of(found).protected
        leading = torch.linalg.svd(update)[0][:, :1]
        seen.append(leading)
        found = carried
    none = method.carry("accumulate", found, finished(0 * now, 4))
    assert none.rule == found.rule


def test_growth_is_an_upper_bound(weight: Tensor, generator: torch.Generator) -> None:
    for preserve in (0.0, 0.3, 0.8):
        method, before = derive(weight, preserve=preserve)
        update = update_of(before, weight, generator)
        after = method.carry("accumulate", before, finished(update, 1))
        sizes = [sum(tensor.float().nbytes for tensor in found.tensors.values()) for found in (before, after)]
        assert sizes[1] - sizes[0] <= method.growth("accumulate", before.rule, {"output": 4})
        assert method.growth("keep", before.rule, {"output": 4}) == 0
