"""A few directions of the inputs: the update, what is orthogonal to the memory, and how that grows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sculptor import AnalyzeSettings
from sculptor.methods.lowrank import LowRank, LowRankRule
from sculptor.methods.method import Derived, Evidence, Moment
from sculptor.methods.rule import Working, is_open
from sculptor.numerics.bases import Basis, protected_directions
from sculptor.numerics.linalg import orthonormal_prefixes

CPU64 = Working(torch.device("cpu"), torch.float64)
SHAPE = (24, 16)


def method_of(**changes: Any) -> LowRank:
    return LowRank(AnalyzeSettings(rule="lowrank", rank=3, **changes))


def evidence(moment: Moment | None = None, task: int = 0, name: str = "w") -> Evidence:
    return Evidence(name, SHAPE, lambda: torch.zeros(SHAPE), inputs=moment, task=task)


def moment_of(generator: torch.Generator, rank: int = 5) -> Moment:
    rows = torch.randn(50, rank, dtype=torch.float64, generator=generator)
    rows = rows @ torch.randn(rank, 16, dtype=torch.float64, generator=generator)
    found = rows.T @ rows
    return Moment((found / found.trace()).float())


def rule_of(derived: Derived) -> LowRankRule:
    assert isinstance(derived.rule, LowRankRule)
    return derived.rule


def memory_of(derived: Derived) -> Tensor:
    side = rule_of(derived).memory
    assert side is not None
    return protected_directions(Basis(derived.tensors["memory"], side.form)).double()


def stored(derived: Derived, dtype: torch.dtype) -> Derived:
    """As an archive of a dtype gives it back: rounded, and orthonormal again; what is exact in float32 at least."""
    found = {}
    for name, tensor in derived.tensors.items():
        rounded = tensor.to(torch.promote_types(dtype, torch.float32) if name in derived.exact else dtype)
        found[name] = orthonormal_prefixes(rounded).float() if rounded.dtype.itemsize < 4 else rounded
    return Derived(derived.rule, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_update_touches_the_memory_over_three_tasks(dtype: torch.dtype, generator: torch.Generator) -> None:
    method = method_of(energy=0.8)
    found = stored(method.derive(evidence()), dtype)
    assert rule_of(found).memory is None
    assert not rule_of(found).opened
    earlier: list[Tensor] = []
    for task in range(1, 4):
        moment = moment_of(generator)
        opened = stored(method.open(found, evidence(moment, task)), dtype)
        rule = rule_of(opened)
        prepared = rule.prepare(opened.tensors, CPU64).tensors
        values = [torch.randn(s, dtype=torch.float64, generator=generator) for s in rule.shapes]
        update = rule.update(torch.zeros(0), prepared, values)
        for memory in earlier:
            assert float((update @ memory).norm()) < 1e-6 * float(update.norm())
        clean = torch.zeros(SHAPE, dtype=torch.float64)
        assert rule.violation(opened.tensors, clean, update, clean).norm < 1e-12 * float(update.norm())
        assert rule_of(found).violation(found.tensors, clean, update, clean).norm < 1e-12 * float(update.norm())
        torch.testing.assert_close(update, values[0] @ prepared["directions"].T)
        found = stored(method.carry("accumulate", opened, evidence(moment, task)), dtype)
        assert rule_of(found).energy >= 0.8
        earlier.append(memory_of(found))
        if not is_open(found.rule):
            break
    assert len(earlier) > 1


def test_the_directions_are_what_the_new_rows_use_most(generator: torch.Generator) -> None:
    method, moment = method_of(energy=0.5), moment_of(generator, rank=3)
    before = method.derive(evidence(moment_of(generator, rank=3)))
    opened = method.open(before, evidence(moment, 1))
    memory = memory_of(before)
    rest = moment.value.double() - memory @ memory.T @ moment.value.double()
    left = torch.linalg.svd(rest)[0][:, :3]
    directions = opened.tensors["directions"]
    torch.testing.assert_close(directions @ directions.T, left @ left.T, atol=1e-6, rtol=0)
    other = method.open(before, evidence(moment, 1, name="v"))
    assert other.tensors["directions"] is directions  # one input, decomposed once
    assert opened.shared == {"memory", "directions"}


def test_what_opposes_the_memory_is_seen(generator: torch.Generator) -> None:
    method = method_of(energy=0.8)
    found = method.derive(evidence(moment_of(generator)))
    clean = torch.zeros(SHAPE, dtype=torch.float64)
    update = torch.randn(SHAPE, dtype=torch.float64, generator=generator)
    expected = float((update @ memory_of(found)).norm())
    assert rule_of(found).violation(found.tensors, clean, update, clean).norm == pytest.approx(expected)
    empty = method.derive(evidence())
    assert rule_of(empty).violation(empty.tensors, clean, update, clean).norm == 0


def test_chance_needs_no_rows_and_is_free_of_the_memory(generator: torch.Generator) -> None:
    method = method_of(energy=0.8, basis="random")
    assert method.measures("open") == method.measures("derive") == "nothing"
    first = method.derive(evidence())
    assert rule_of(first).opened
    assert torch.equal(first.tensors["directions"], method.derive(evidence()).tensors["directions"])
    second = method.carry("accumulate", first, evidence(moment_of(generator), 1))
    assert float((memory_of(second).T @ second.tensors["directions"]).norm()) < 1e-10
    assert second.shared == {"memory"}


def test_a_full_memory_closes_the_matrix(generator: torch.Generator) -> None:
    method = method_of(energy=1.0)
    found = method.derive(evidence(moment_of(generator, rank=16)))
    assert rule_of(found).protected == 16
    assert not is_open(found.rule)
    assert found.rule.figures().preserved == 1
    opened = method.open(found, evidence(moment_of(generator), 1))
    assert opened.tensors["directions"].shape == (16, 0)


def test_a_matrix_that_no_row_reaches_keeps_its_memory(generator: torch.Generator) -> None:
    method = method_of(energy=0.8)
    found = method.derive(evidence(moment_of(generator)))
    same = method.carry("accumulate", found, evidence(None, 1))
    assert same.rule == found.rule
    assert torch.equal(same.tensors["memory"], found.tensors["memory"])


def test_growth_is_an_upper_bound(generator: torch.Generator) -> None:
    for energy in (0.5, 0.9, 0.999):
        method = method_of(energy=energy)
        before = method.derive(evidence(moment_of(generator)))
        after = method.carry("accumulate", before, evidence(moment_of(generator, 9), 1))
        sizes = [sum(tensor.float().nbytes for tensor in found.tensors.values()) for found in (before, after)]
        assert sizes[1] - sizes[0] <= method.growth("accumulate", before.rule, {"memory": 4})
