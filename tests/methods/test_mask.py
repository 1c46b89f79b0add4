"""The smallest entries: which they are, what they add up to, and how the mask goes on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sculptor import AnalyzeSettings
from sculptor.errors import ArchiveError
from sculptor.methods.mask import Mask, MaskRule
from sculptor.methods.method import Derived, Evidence
from sculptor.methods.rule import Working
from sculptor.numerics.masks import pack

CPU64 = Working(torch.device("cpu"), torch.float64)


def derive(weight: Tensor, **changes: Any) -> tuple[Mask, Derived]:
    method = Mask(AnalyzeSettings(rule="mask", **changes))
    m, n = weight.shape
    return method, method.derive(Evidence("w", (m, n), lambda: weight))


def rule_of(derived: Derived) -> MaskRule:
    assert isinstance(derived.rule, MaskRule)
    return derived.rule


def mask_of(derived: Derived) -> Tensor:
    return rule_of(derived).mask(derived.tensors)


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return torch.randn(24, 40, dtype=torch.float64, generator=generator)


def test_the_smallest_of_each_matrix_are_trained(weight: Tensor, generator: torch.Generator) -> None:
    _, found = derive(weight, free=0.25)
    rule, mask = rule_of(found), mask_of(found)
    assert rule.free == int(mask.sum()) == 240
    assert float(weight[mask].abs().max()) == rule.threshold < float(weight[~mask].abs().min())
    assert rule.figures().preserved == 0.75
    assert rule.figures().held == pytest.approx(float(weight[~mask].square().sum() / weight.square().sum()))
    values = torch.randn(240, dtype=torch.float64, generator=generator)
    prepared = rule.prepare(found.tensors, CPU64)
    expected = torch.zeros_like(weight)
    expected[mask] = values
    assert torch.equal(rule.update(weight, prepared.tensors, [values]), expected)
    gradient = torch.randn(24, 40, dtype=torch.float64, generator=generator)
    assert torch.equal(rule.project(weight, prepared.tensors, [values], gradient)[0], gradient[mask])


def test_a_tenth_unless_told_otherwise(weight: Tensor) -> None:
    assert rule_of(derive(weight)[1]).free == 96
    assert rule_of(derive(weight, free=1e-9)[1]).free == 1
    assert not bool(mask_of(derive(weight, basis="random")[1]).equal(mask_of(derive(weight)[1])))


def test_what_is_frozen_only_grows(weight: Tensor, generator: torch.Generator) -> None:
    method, before = derive(weight, free=0.25)
    mask = mask_of(before)
    update = torch.zeros_like(weight)
    update[mask] = 0.1 * torch.randn(240, dtype=torch.float64, generator=generator)
    new = weight + update
    after = method.carry("accumulate", before, Evidence("w", (24, 40), lambda: new, update=update, task=1))
    order = (update.square() * mask).flatten().argsort(descending=True)
    used = torch.zeros(24 * 40, dtype=torch.bool)
    used[order[:60]] = True  # a quarter, which is fewer than hold 95 %
    expected = mask & (new.abs() <= rule_of(before).threshold) & ~used.view(24, 40)
    assert torch.equal(mask_of(after), expected)
    assert rule_of(after).threshold == rule_of(before).threshold
    assert rule_of(after).free == int(expected.sum()) < 180
    third = method.carry("accumulate", after, Evidence("w", (24, 40), lambda: new, update=0 * update, task=2))
    assert torch.equal(mask_of(third), expected)


def test_retake_frees_the_smallest_of_the_new_weights(weight: Tensor, generator: torch.Generator) -> None:
    method, before = derive(weight, free=0.25)
    new = weight + torch.randn(24, 40, dtype=torch.float64, generator=generator)
    after = method.carry("retake", before, Evidence("w", (24, 40), lambda: new, task=1))
    assert torch.equal(mask_of(after), mask_of(derive(new, free=0.25)[1]))


def test_nothing_left_is_closed(weight: Tensor) -> None:
    method, before = derive(weight, free=0.25)
    update = 9.0 * mask_of(before)
    after = method.carry("accumulate", before, Evidence("w", (24, 40), lambda: weight + update, update=update, task=1))
    assert after.rule.shapes == ()
    assert after.rule.figures().preserved == 1


def test_rounding_excuses_no_change_of_a_frozen_entry(weight: Tensor) -> None:
    """Unless a cast changed them all."""
    _, found = derive(weight, free=0.25)
    rule, mask = rule_of(found), mask_of(found)
    update = torch.where(mask, 0.01, 0.0).double()
    variance = torch.full_like(weight, 1e-8 / 12)
    assert rule.violation(found.tensors, weight, update, variance)[:2] == (0.0, 0.0)
    row, column = (~mask).nonzero()[0].tolist()
    update[row, column] = 1e-4  # one unit in the last place
    violation = rule.violation(found.tensors, weight, update, variance)
    assert violation.norm == pytest.approx(1e-4)
    assert violation.norm > 1.25 * violation.rounding > 0


def test_bits_that_are_not_the_rules_are_refused(weight: Tensor) -> None:
    _, found = derive(weight, free=0.25)
    with pytest.raises(ArchiveError, match="a mask of 960 entries, expected 240"):
        rule_of(found).prepare({"bits": pack(torch.ones(24, 40, dtype=torch.bool))}, CPU64)
    with pytest.raises(ValueError, match="961 free entries of 960"):
        replace(rule_of(found), free=961)
