"""What an archive keeps of a task."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sculptor import AnalyzeSettings
from sculptor.methods.method import Derived, Evidence
from sculptor.methods.rule import Working, num_free
from sculptor.methods.staircase import StaircaseRule
from sculptor.methods.weights import Weights, accumulate, analyze_matrix, num_leading
from sculptor.numerics.staircase import Constraint

COVERS = ["sculptor.methods.staircase"]
CPU64 = Working(torch.device("cpu"), torch.float64)


def rule_of(derived: Derived) -> StaircaseRule:
    assert isinstance(derived.rule, StaircaseRule)
    return derived.rule


def derive(constraint: Constraint, k: int, generator: torch.Generator, m: int = 24, n: int = 40) -> Derived:
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    method = Weights(AnalyzeSettings(preserve=k / min(m, n), constraint=constraint))
    return method.derive(Evidence("w", (m, n), lambda: weight))


def update_of(found: Derived, generator: torch.Generator, rank: int | None = None) -> Tensor:
    """A random allowed update."""
    rule = rule_of(found)
    prepared = rule.prepare(found.tensors, CPU64).tensors
    parts = []
    for group in rule.staircase.free:
        p, q = group.stop - group.start, rule.shape[1] - group.reach
        r = rank or min(p, q)
        left = torch.randn(p, r, dtype=torch.float64, generator=generator)
        parts.append(left @ torch.randn(r, q, dtype=torch.float64, generator=generator))
    values = [torch.cat([part.flatten() for part in parts]).view(shape) for shape in rule.shapes]
    return rule.update(torch.empty(0), prepared, values)


def frozen(found: Derived, update: Tensor) -> float:
    return rule_of(found).violation(found.tensors, update, update, torch.zeros_like(update)).norm


def grow(found: Derived, update: Tensor, constraint: Constraint, task: int = 1) -> Derived:
    return accumulate(rule_of(found), found.tensors, update, constraint, task)


def added(found: Derived, task: int = 1) -> tuple[int, int]:
    return found.rule.figures().added.get(task, (0, 0))


@pytest.mark.parametrize("constraint", ["double", "input", "core"])
@pytest.mark.parametrize("k", [0, 8, 18])
def test_growth_protects_the_leading_part_of_the_update_and_all_before(
    constraint: Constraint, k: int, generator: torch.Generator
) -> None:
    before = derive(constraint, k, generator)
    update = update_of(before, generator, rank=2)
    after = grow(before, update, constraint)
    assert num_free(after.rule) < num_free(before.rule)
    second = update_of(after, generator)
    assert frozen(before, second) < 1e-10 * float(second.norm())  # bases only grow: what was protected stays so
    free = (40 - k) if constraint == "input" else 24 - k
    u, s, vh = torch.linalg.svd(update)
    leading = min(num_leading(s), max(1, free // 4))
    task = (u[:, :leading] * s[:leading]) @ vh[:leading]
    if constraint != "core":
        assert frozen(after, task) == pytest.approx(float(task.norm()))
        assert added(after)[1] == leading


def test_the_fewest_directions_that_hold_95_percent() -> None:
    update = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0]))
    squares = torch.tensor([9.0, 4.0, 1.0, 0.25, 0.01])
    assert float(squares[:3].sum() / squares.sum()) > 0.95 > float(squares[:2].sum() / squares.sum())
    assert num_leading(torch.diagonal(update)) == 3
    assert num_leading(torch.tensor([1.0, 0.0])) == 1


@pytest.mark.parametrize(("k", "count"), [(0, 6), (16, 2), (20, 1), (22, 1), (23, 0)])
def test_at_most_a_quarter_of_what_is_free_and_never_the_last(k: int, count: int, generator: torch.Generator) -> None:
    before = derive("double", k, generator)
    carried = grow(before, update_of(before, generator), "double")
    assert added(carried) == (count, count)
    assert (num_free(carried.rule) == 0) == (k == 23)


def test_capacity_runs_out_after_enough_tasks(generator: torch.Generator) -> None:
    found = derive("double", 18, generator)
    free = []
    for task in range(1, 21):
        free.append(num_free(found.rule))
        if not free[-1]:
            break
        found = grow(found, update_of(found, generator), "double", task)
    assert free == sorted(free, reverse=True)
    assert len(set(free)) == len(free)
    assert free[-1] == 0
    closed = grow(found, torch.ones(24, 40, dtype=torch.float64), "double")
    assert num_free(closed.rule) == 0


def test_no_update_adds_nothing(generator: torch.Generator) -> None:
    before = derive("double", 8, generator)
    assert grow(before, torch.zeros(24, 40, dtype=torch.float64), "double").rule == before.rule


def test_a_task_is_noted_by_its_place_in_the_history(generator: torch.Generator) -> None:
    """A task that adds nothing, as one that changed nothing, leaves a gap."""
    before = derive("double", 8, generator)
    same = grow(before, torch.zeros(24, 40, dtype=torch.float64), "double", task=1)
    grown = grow(same, update_of(same, generator), "double", task=2)
    assert set(grown.rule.figures().added) == {0, 2}


def test_retake_decomposes_again_with_the_same_count(generator: torch.Generator) -> None:
    before = derive("double", 8, generator)
    weight = torch.randn(24, 40, dtype=torch.float64, generator=generator)
    method = Weights(AnalyzeSettings(preserve=0.5))
    found = method.carry("retake", before, Evidence("w", (24, 40), lambda: weight, task=1))
    reference = analyze_matrix(weight, "double", 8)
    assert rule_of(found).staircase == reference.staircase
    assert reference.output is not None
    assert torch.equal(found.tensors["output"], reference.output.vectors)


def test_a_rule_may_be_closed_by_hand(generator: torch.Generator) -> None:
    before = derive("double", 8, generator)
    closed = replace(rule_of(before), steps=((24, 40),))
    assert closed.shapes == ()
