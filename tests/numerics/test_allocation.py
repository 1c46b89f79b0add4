"""Which pairs are frozen, against a search over every threshold, pair by pair, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sculptor.numerics.allocation import STEPS, Importance, allocate, least_free_share
from sculptor.numerics.staircase import Staircase


def spectrum(size: int, generator: torch.Generator, decay: float = 2.0) -> Tensor:
    """Positive and descending."""
    values = torch.rand(size, generator=generator, dtype=torch.float64) + 0.01
    return (values * torch.arange(1, size + 1, dtype=torch.float64) ** -decay).sort(descending=True).values


def whole(rows: int, columns: int, generator: torch.Generator, scale: float = 1.0, decay: float = 1.0) -> Importance:
    """A matrix of which every direction is stored."""
    outputs, inputs = spectrum(rows, generator, decay), spectrum(columns, generator, decay)
    return Importance(rows, outputs, inputs, rows, columns, scale)


def ends_of(matrix: Importance, steps: int) -> list[int]:
    """m / 2^(steps - 1), ..., m / 2, as far as directions are stored, and m."""
    if matrix.outputs is None:
        return [matrix.rows]
    halves = {max(1, round(matrix.rows / 2**power)) for power in range(1, steps)}
    return [*sorted(end for end in halves if end <= min(matrix.stored_outputs, matrix.rows - 1)), matrix.rows]


def pair_levels(matrix: Importance, steps: int) -> Tensor:
    """Importance of every pair (m, n): the mean of its row group times its column's, or the columns' that are not stored."""
    outputs = torch.ones(matrix.rows, dtype=torch.float64) if matrix.outputs is None else matrix.outputs.double()
    rows = torch.empty(matrix.rows, dtype=torch.float64)
    start = 0
    for end in ends_of(matrix, steps):
        rows[start:end] = sum(outputs[start:end].tolist()) / (end - start)
        start = end
    columns = matrix.inputs.double().clone()
    if matrix.stored_inputs < matrix.columns:
        rest = columns[matrix.stored_inputs :].tolist()
        columns[matrix.stored_inputs :] = sum(rest) / len(rest)
    return matrix.scale * rows[:, None] * columns


def mask(staircase: Staircase) -> Tensor:
    """The frozen pairs (m, n)."""
    found = torch.zeros(staircase.rows, staircase.columns, dtype=torch.bool)
    for start, stop, reach in staircase.groups:
        found[start:stop, :reach] = True
    return found


def search(matrices: list[Importance], budget: float, steps: int) -> list[Tensor]:
    """Masks under the lowest threshold that leaves the budget free, by trying all of them."""
    levels = [pair_levels(matrix, steps) for matrix in matrices]
    pairs = sum(level.numel() for level in levels)
    for threshold in sorted({-1.0, *itertools.chain(*(level.flatten().tolist() for level in levels))}):
        masks = [level > threshold * (1 + 1e-12) for level in levels]
        if pairs - sum(int(found.sum()) for found in masks) >= budget * pairs - 1e-6:
            return masks
    raise AssertionError("nothing is above the largest")


@pytest.mark.parametrize("steps", [1, 2, 3, STEPS])
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.37, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(8, 6), (5, 9), (1, 7), (7, 1), (16, 16)])
def test_one_matrix_is_what_the_search_finds(
    shape: tuple[int, int], budget: float, steps: int, generator: torch.Generator
) -> None:
    matrix = whole(*shape, generator)
    (found,) = allocate([matrix], budget, steps)
    (expected,) = search([matrix], budget, steps)
    assert torch.equal(mask(found), expected)


@pytest.mark.parametrize("budget", [0.05, 0.4, 0.75, 0.95])
def test_several_matrices_share_the_threshold_that_the_search_finds(budget: float, generator: torch.Generator) -> None:
    matrices = [
        whole(8, 6, generator, scale=0.2),
        whole(4, 10, generator, scale=3.0),
        Importance(6, None, spectrum(8, generator), 0, 8, 1.0),
        whole(9, 9, generator, scale=0.0),
    ]
    found = allocate(matrices, budget, 3)
    for staircase, expected in zip(found, search(matrices, budget, 3), strict=True):
        assert torch.equal(mask(staircase), expected)
    assert len({staircase.frozen_share for staircase in found}) > 1, "the budget is everyone's, not each one's"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("stored", [(16, 12), (16, 5), (8, 12), (4, 5), (1, 1)])
def test_the_budget_is_met_by_less_than_a_column_of_a_group(seed: int, stored: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 16, 12
    matrix = Importance(rows, spectrum(rows, generator), spectrum(columns, generator), *stored)
    least = least_free_share([matrix], 4)
    for share in torch.linspace(0, 1, 21).tolist():
        budget = least + share * (1 - least)
        (found,) = allocate([matrix], budget, 4)
        excess = found.num_free - budget * rows * columns
        assert excess >= -1e-6
        ends = [0, *ends_of(matrix, 4)]
        column = max(b - a for a, b in itertools.pairwise(ends))
        # Columns that are not stored have one importance, and freeze together.
        block = column * max(1, columns - stored[1] if found.num_frozen else 1)
        assert excess < (column if stored[1] == columns else block) + 1e-6


@pytest.mark.parametrize("stored", [(16, 5), (8, 12), (4, 5), (1, 1)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_only_directions_that_are_stored_are_told_apart(
    stored: tuple[int, int], share: float, generator: torch.Generator
) -> None:
    matrix = Importance(16, spectrum(16, generator), spectrum(12, generator), *stored)
    least = least_free_share([matrix], 5)
    (found,) = allocate([matrix], least + share * (1 - least), 5)
    assert found.outputs <= stored[0]
    assert found.inputs <= stored[1]
    for stop, reach in found.steps:
        assert reach <= stored[1] or reach == 12
        assert stop in ends_of(matrix, 5)
        assert stop < 16 or reach < 12 or stored[1] == 12, "what no output is stored of never freezes whole"


def test_least_is_every_stored_direction_wherever_it_can_be(generator: torch.Generator) -> None:
    assert least_free_share([whole(8, 6, generator)]) == 0
    matrix = Importance(16, spectrum(16, generator), spectrum(12, generator), 4, 5)
    # Row groups end at 1, 2, 4 and 16: the first four rows freeze whole, the others as far as inputs are stored.
    assert least_free_share([matrix], STEPS) == pytest.approx(12 * 7 / (16 * 12))
    assert least_free_share([matrix], 1) == pytest.approx(7 / 12), "one group has outputs that are not stored"
    inputs = Importance(16, None, spectrum(12, generator), 0, 5)
    assert least_free_share([inputs]) == pytest.approx(7 / 12)
    both = least_free_share([matrix, inputs])
    assert both == pytest.approx((12 * 7 + 16 * 7) / (2 * 16 * 12))


@pytest.mark.parametrize("stored", [(4, 5), (16, 5), (2, 12)])
def test_the_least_share_can_be_had(stored: tuple[int, int], generator: torch.Generator) -> None:
    matrix = Importance(16, spectrum(16, generator), spectrum(12, generator), *stored)
    least = least_free_share([matrix])
    (found,) = allocate([matrix], least)
    assert found.num_free == round(least * 16 * 12)


@pytest.mark.parametrize("steps", range(1, STEPS + 1))
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 64, 100])
def test_row_groups_end_at_halves(rows: int, steps: int, generator: torch.Generator) -> None:
    matrix = Importance(rows, spectrum(rows, generator), spectrum(4, generator), rows, 4)
    ends = matrix.ends(steps)
    assert list(ends) == ends_of(matrix, steps)
    assert 1 <= len(ends) <= steps
    assert ends[-1] == rows
    assert all(a < b for a, b in itertools.pairwise(ends))
    narrow = Importance(rows, matrix.outputs, matrix.inputs, max(1, rows // 4), 4)
    assert all(end <= max(1, rows // 4) or end == rows for end in narrow.ends(steps))


def test_group_means_and_levels_are_those_of_the_pairs(generator: torch.Generator) -> None:
    matrix = Importance(8, spectrum(8, generator), spectrum(6, generator), 8, 4, 0.5)
    assert matrix.outputs is not None
    g, c = matrix.outputs.tolist(), matrix.inputs.tolist()
    means = [g[0], g[1], (g[2] + g[3]) / 2, sum(g[4:]) / 4]
    torch.testing.assert_close(matrix.group_means(4), torch.tensor(means, dtype=torch.float64))
    levels = matrix.levels(4)
    assert levels.shape == (4, 5)
    expected = [[0.5 * mean * x for x in (*c[:4], (c[4] + c[5]) / 2)] for mean in means]
    expected[-1][-1] = -math.inf
    torch.testing.assert_close(levels, torch.tensor(expected, dtype=torch.float64))


def test_one_row_group_freezes_whole_columns(generator: torch.Generator) -> None:
    (found,) = allocate([whole(8, 6, generator)], 0.5, 1)
    assert found.steps == ((8, 3),)
    inputs = Importance(8, None, spectrum(6, generator), 0, 6)
    assert allocate([inputs], 0.5, STEPS)[0].steps == ((8, 3),)


def test_equal_pairs_freeze_together_or_not_at_all() -> None:
    """Of 4 x 6 pairs 12 have the one importance and 12 the other."""
    inputs = torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    matrix = Importance(4, None, inputs, 0, 6)
    for budget, reach in ((0.0, 6), (1e-6, 3), (0.25, 3), (0.5, 3), (0.51, 0), (1.0, 0)):
        assert allocate([matrix], budget)[0].steps == ((4, reach),), budget


def test_a_tie_between_matrices_is_none_for_the_budget() -> None:
    matrices = [Importance(4, None, torch.ones(6, dtype=torch.float64), 0, 6) for _ in range(3)]
    assert [found.num_free for found in allocate(matrices, 0.1)] == [24, 24, 24]
    assert [found.num_free for found in allocate(matrices, 0.0)] == [0, 0, 0]


def test_importances_of_zero_freeze_only_when_everything_does() -> None:
    zeros = Importance(4, torch.zeros(4), torch.zeros(6), 4, 6)
    assert allocate([zeros], 0.0)[0].num_free == 0
    assert allocate([zeros], 0.01)[0].num_free == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_spectra_are_compared_in_float64(dtype: torch.dtype, generator: torch.Generator) -> None:
    matrix = whole(8, 6, generator)
    assert matrix.outputs is not None
    narrow = Importance(8, matrix.outputs.to(dtype), matrix.inputs.to(dtype), 8, 6)
    assert narrow.levels(4).dtype == torch.float64
    (found,) = allocate([narrow], 0.4, 4)
    assert torch.equal(mask(found), search([narrow], 0.4, 4)[0])


def test_protected_share_sums_the_frozen_pairs(generator: torch.Generator) -> None:
    matrix = Importance(8, spectrum(8, generator), spectrum(6, generator), 8, 4)
    assert matrix.outputs is not None
    curvature = matrix.outputs[:, None] * matrix.inputs
    for budget in (0.3, 0.6, 1.0):
        (found,) = allocate([matrix], budget, 4)
        expected = float(curvature[mask(found)].sum() / curvature.sum())
        assert matrix.protected_share(found) == pytest.approx(expected, abs=1e-12)
    inputs = Importance(8, None, matrix.inputs, 0, 4)
    share = inputs.protected_share(Staircase(8, 6, ((8, 2),)))
    assert share == pytest.approx(float(matrix.inputs[:2].sum() / matrix.inputs.sum()))
    nothing = Importance(8, torch.zeros(8), torch.zeros(6), 8, 6)
    assert nothing.protected_share(Staircase.closed(8, 6)) == 0.0


@pytest.mark.parametrize("budget", [0.0, 0.43, 1.0001, -0.1, float("nan")])
def test_what_cannot_be_had_is_refused(budget: float, generator: torch.Generator) -> None:
    matrix = Importance(16, spectrum(16, generator), spectrum(12, generator), 4, 5)
    with pytest.raises(
        ValueError, match=r"free share .* is not between 0\.438, which the stored directions allow, and 1"
    ):
        allocate([matrix], budget)


def test_it_is_the_same_every_time(generator: torch.Generator) -> None:
    matrices = [whole(8, 6, generator), whole(5, 9, generator)]
    assert allocate(matrices, 0.3) == allocate(matrices, 0.3)
    turned = allocate(matrices[::-1], 0.3)[::-1]
    assert turned == allocate(matrices, 0.3), "whatever the order of the matrices"


def test_single_columns_still_freeze_where_what_is_not_stored_does_not_fit() -> None:
    outputs, inputs = 1 / torch.arange(1.0, 5), 1 / torch.arange(1.0, 7)
    (found,) = allocate([Importance(4, outputs, inputs, 2, 2)], 0.6, 3)
    # The four columns that are not stored come next in the first row: one threshold alone stops before them, at 18 free.
    assert (found.steps, found.num_free) == (((4, 2),), 16)
