"""What an archive keeps of a task."""

from dataclasses import replace

import pytest
import torch

from sculptor.analysis.carry import accumulate, num_leading, retake
from sculptor.analysis.weights import analyze_matrix
from sculptor.archive.manifest import Added, MatrixRecord
from sculptor.archive.store import Subspaces
from sculptor.numerics.bases import frozen_norm
from sculptor.numerics.free_space import FreeSpace
from sculptor.numerics.reflectors import CompleteBasis
from sculptor.numerics.staircase import Constraint


def subspaces(constraint: Constraint, k: int, generator: torch.Generator, m: int = 24, n: int = 40) -> Subspaces:
    weight = torch.randn(m, n, dtype=torch.float64, generator=generator)
    found = analyze_matrix(weight, constraint, k)
    record = MatrixRecord(
        "w", "w", "b", 0, "r", (m, n), False, "g", "float32", "", found.staircase.steps, None, None, None,
        0.5, None, 0.5, (Added(0, k, k),),
    )  # fmt: skip
    return Subspaces(record, found.output, found.input)


def update_of(found: Subspaces, generator: torch.Generator, rank: int | None = None) -> torch.Tensor:
    space = FreeSpace(
        found.record.staircase,
        found.output and CompleteBasis.of(found.output),
        found.input and CompleteBasis.of(found.input),
    )
    values = []
    for p, q in space.shapes:
        r = rank or min(p, q)
        left = torch.randn(p, r, dtype=torch.float64, generator=generator)
        values.append(left @ torch.randn(r, q, dtype=torch.float64, generator=generator))
    return space.fold(values)


@pytest.mark.parametrize("constraint", ["double", "input", "core"])
@pytest.mark.parametrize("k", [0, 8, 18])
def test_growth_protects_the_leading_part_of_the_update_and_all_before(
    constraint: Constraint, k: int, generator: torch.Generator
) -> None:
    before = subspaces(constraint, k, generator)
    update = update_of(before, generator, rank=2)
    carried = accumulate(before, update, constraint)
    after = Subspaces(replace(before.record, steps=carried.staircase.steps), carried.output, carried.input)
    assert carried.staircase.num_free < before.record.staircase.num_free
    second = update_of(after, generator)
    old = frozen_norm(second, before.record.staircase, before.output, before.input)
    assert old < 1e-10 * float(second.norm())  # bases only grow: what was protected stays so
    free = (40 - k) if constraint == "input" else 24 - k
    u, s, vh = torch.linalg.svd(update)
    leading = min(num_leading(s), max(1, free // 4))
    task = (u[:, :leading] * s[:leading]) @ vh[:leading]
    if constraint != "core":
        assert frozen_norm(task, carried.staircase, carried.output, carried.input) == pytest.approx(float(task.norm()))
        assert carried.inputs_added == leading


def test_the_fewest_directions_that_hold_95_percent() -> None:
    update = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0]))
    squares = torch.tensor([9.0, 4.0, 1.0, 0.25, 0.01])
    assert float(squares[:3].sum() / squares.sum()) > 0.95 > float(squares[:2].sum() / squares.sum())
    assert num_leading(torch.diagonal(update)) == 3
    assert num_leading(torch.tensor([1.0, 0.0])) == 1


@pytest.mark.parametrize(("k", "added"), [(0, 6), (16, 2), (20, 1), (22, 1), (23, 0)])
def test_at_most_a_quarter_of_what_is_free_and_never_the_last(k: int, added: int, generator: torch.Generator) -> None:
    before = subspaces("double", k, generator)
    carried = accumulate(before, update_of(before, generator), "double")
    assert carried.outputs_added == carried.inputs_added == added
    assert (carried.staircase.num_free == 0) == (k == 23)


def test_capacity_runs_out_after_enough_tasks(generator: torch.Generator) -> None:
    found = subspaces("double", 18, generator)
    free = []
    for _ in range(20):
        free.append(found.record.staircase.num_free)
        if not free[-1]:
            break
        carried = accumulate(found, update_of(found, generator), "double")
        found = Subspaces(replace(found.record, steps=carried.staircase.steps), carried.output, carried.input)
    assert free == sorted(free, reverse=True)
    assert len(set(free)) == len(free)
    assert free[-1] == 0
    closed = accumulate(found, torch.ones(24, 40, dtype=torch.float64), "double")
    assert closed.staircase.num_free == 0


def test_no_update_adds_nothing(generator: torch.Generator) -> None:
    before = subspaces("double", 8, generator)
    carried = accumulate(before, torch.zeros(24, 40, dtype=torch.float64), "double")
    assert carried.staircase == before.record.staircase
    assert carried.outputs_added == carried.inputs_added == 0


def test_retake_decomposes_again_with_the_same_count(generator: torch.Generator) -> None:
    before = subspaces("double", 8, generator)
    weight = torch.randn(24, 40, dtype=torch.float64, generator=generator)
    found, reference = retake(before.record, weight, "double"), analyze_matrix(weight, "double", 8)
    assert found.staircase == reference.staircase
    assert found.output is not None
    assert reference.output is not None
    assert torch.equal(found.output.vectors, reference.output.vectors)
