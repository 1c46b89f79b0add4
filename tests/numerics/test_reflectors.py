"""Free directions in their cheapest form, and what is folded and projected with them."""

import pytest
import torch
from numerics.sides import CASES, by_group, orthonormal, sides
from torch import Tensor

from sculptor.methods.sides import side_of
from sculptor.methods.staircase import StaircaseRule
from sculptor.numerics import reflectors
from sculptor.numerics.bases import Basis, Form
from sculptor.numerics.free_space import FreeSpace, box_origin
from sculptor.numerics.reflectors import Columns, CompleteBasis, FreeSide, box_start, free_side
from sculptor.numerics.staircase import Constraint, Staircase

SIZES = [(10, 1), (10, 4), (10, 5), (10, 6), (10, 9), (10, 10), (1, 1), (7, 0)]
FORMS: tuple[Form, ...] = ("leading", "free")
MIXED = [((1, 7), (3, 5), (5, 2), (8, 0)), ((2, 10), (4, 6), (8, 1)), ((3, 4), (8, 4)), ((1, 6), (6, 3), (8, 2))]


def signs(side: FreeSide, complete: CompleteBasis, start: int) -> Tensor:
    """How the directions of a side are turned against those of the reflectors, (d - start, 1)."""
    identity = torch.eye(side.dim - start, dtype=torch.float64)
    return (side.apply(identity, start) * complete.apply(identity, start)).sum(dim=0)[:, None].sign()


@pytest.mark.parametrize(("d", "c"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_it_applies_the_directions_that_the_reflectors_do(
    d: int, c: int, form: Form, generator: torch.Generator
) -> None:
    basis = Basis(orthonormal(d, c, generator), form)
    complete = CompleteBasis.of(basis)
    x = torch.randn(d, 3, dtype=torch.float64, generator=generator)
    for start in range(d):
        side = free_side(basis, start)
        assert side.dim == d
        # Reflectors turn a stored direction over at times; written out, it is as it is stored.
        turned = signs(side, complete, start)
        if form == "leading" or isinstance(side, CompleteBasis):
            assert bool((turned == 1).all())
        expected = turned * complete.apply_transposed(x, start)
        torch.testing.assert_close(side.apply_transposed(x, start), expected, atol=1e-12, rtol=0)
        expected = complete.apply(turned * x[start:], start)
        torch.testing.assert_close(side.apply(x[start:], start), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("d", "c"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_results_lie_in_memory_as_what_is_turned(d: int, c: int, form: Form, generator: torch.Generator) -> None:
    side = free_side(Basis(orthonormal(d, c, generator), form), d // 3)
    free = d - d // 3
    x, y = (torch.randn(rows, 3, dtype=torch.float64, generator=generator) for rows in (d, free))
    for turn, of in ((side.apply_transposed, x), (side.apply, y)):
        by_rows, by_columns = turn(of, d // 3), turn(of.T.contiguous().T, d // 3)
        torch.testing.assert_close(by_columns, by_rows, atol=1e-13, rtol=0)
        assert by_rows.is_contiguous()
        assert by_columns.T.is_contiguous()


@pytest.mark.parametrize(("d", "c"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_directions_are_written_out_where_that_is_less_to_do_and_little_more_to_keep(
    d: int, c: int, form: Form, generator: torch.Generator
) -> None:
    basis = Basis(orthonormal(d, c, generator), form)
    for start in range(d):
        side = free_side(basis, start)
        written, reflectors = d * (d - start), c * (2 * d + c - start)
        little = 3 * written <= 4 * c * (d + c)
        assert isinstance(side, Columns) == (d - start <= c or (written <= reflectors and little))
        assert side.cost(start) == (written if isinstance(side, Columns) else reflectors)
        assert side.cost(start) <= reflectors or not little
        assert 3 * sum(tensor.numel() for tensor in side.tensors().values()) <= 4 * c * (d + c)


@pytest.mark.parametrize(("d", "c"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_later_directions_of_a_side_are_its_last_ones(d: int, c: int, form: Form, generator: torch.Generator) -> None:
    basis = Basis(orthonormal(d, c, generator), form)
    x = torch.randn(d, 2, dtype=torch.float64, generator=generator)
    for first in range(d):
        side = free_side(basis, first)
        whole = side.apply_transposed(x, first)
        for start in range(first, d):
            torch.testing.assert_close(side.apply_transposed(x, start), whole[start - first :], atol=1e-12, rtol=0)
            padded = torch.cat([torch.zeros(start - first, 2, dtype=torch.float64), x[start:]])
            torch.testing.assert_close(side.apply(x[start:], start), side.apply(padded, first), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_directions_are_orthonormal_and_leave_out_what_is_protected(form: Form, generator: torch.Generator) -> None:
    for c in (3, 7):
        basis = Basis(orthonormal(10, c, generator), form)
        k = basis.directions
        q = free_side(basis, k).apply(torch.eye(10 - k, dtype=torch.float64), k)
        torch.testing.assert_close(q.T @ q, torch.eye(10 - k, dtype=torch.float64), atol=1e-12, rtol=0)
        projector = q @ q.T
        stored = basis.vectors @ basis.vectors.T
        expected = torch.eye(10, dtype=torch.float64) - stored if form == "leading" else stored
        torch.testing.assert_close(projector, expected, atol=1e-12, rtol=0)


def test_a_fingerprint_does_not_tell_forms_apart_but_bases(generator: torch.Generator) -> None:
    vectors = orthonormal(64, 40, generator)
    basis = Basis(vectors, "leading")
    columns, complete = free_side(basis, 40), CompleteBasis.of(basis)
    assert isinstance(columns, Columns)
    expected = complete.fingerprint(40)
    assert columns.fingerprint(40) == pytest.approx(expected, abs=1e-10)
    assert columns.to(dtype=torch.float32).fingerprint(40) == pytest.approx(expected, abs=1e-4)
    for other in (free_side(Basis(orthonormal(64, 40, generator), "leading"), 40), free_side(basis, 50)):
        assert isinstance(other, Columns)
        found = other.fingerprint(other.start)
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) > 1e-2


def test_sides_are_the_same_every_time(generator: torch.Generator) -> None:
    basis = Basis(orthonormal(20, 12, generator), "leading")
    for start in (0, 12):
        first, second = free_side(basis, start), free_side(basis, start)
        for name, tensor in first.tensors().items():
            assert torch.equal(tensor, second.tensors()[name])


def widened(basis: Basis | None, start: int) -> tuple[FreeSide | None, ...]:
    """A side in its cheapest form, and as reflectors."""
    return (None, None) if basis is None else (free_side(basis, start), CompleteBasis.of(basis))


def dense(side: FreeSide | None, start: int, d: int) -> Tensor:
    identity = torch.eye(d - start, dtype=torch.float64)
    return torch.eye(d, dtype=torch.float64)[:, start:] if side is None else side.apply(identity, start)


def reference(space: FreeSpace, coordinates: list[Tensor], gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """dW and the gradients of the coordinates, from dense bases in float64, one row group at a time."""
    stairs = space.staircase
    update, projected = torch.zeros(stairs.rows, stairs.columns, dtype=torch.float64), []
    q_u, q_v = dense(space.output, space.first, stairs.rows), dense(space.input, space.least, stairs.columns)
    gains = torch.ones(q_u.shape[1], q_v.shape[1], dtype=torch.float64)
    if space.softening is not None:
        gains = 1 / (1 + torch.outer(*(part.double() for part in space.softening))).sqrt()
    for group, a in zip(space.groups, by_group(space, coordinates), strict=True):
        rows, columns = (
            slice(group.start - space.first, group.stop - space.first),
            slice(group.reach - space.least, None),
        )
        left, right, soft = q_u[:, rows], q_v[:, columns], gains[rows, columns]
        update += left @ (a.double() * soft) @ right.T
        projected.append((left.T @ gradient.double() @ right) * soft)
    return update, projected


def check(space: FreeSpace, generator: torch.Generator, tolerance: float = 1e-12) -> None:
    stairs = space.staircase
    coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in space.shapes]
    gradient = torch.randn(stairs.rows, stairs.columns, dtype=torch.float64, generator=generator)
    update, projected = reference(space, coordinates, gradient)
    torch.testing.assert_close(space.fold(coordinates), update, atol=tolerance, rtol=0)
    found_all = space.project(gradient)
    assert [found.shape for found in found_all] == [a.shape for a in coordinates]
    for found, expected in zip(by_group(space, found_all), projected, strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.fixture(params=[1, 3, 4])
def aligned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Boxes of any size, or of multiples of something, wherever they are not tiny."""
    monkeypatch.setattr(reflectors, "ALIGNED", request.param)
    monkeypatch.setattr(reflectors, "WIDE", 3)
    return int(request.param)


def test_a_large_box_has_good_sides(aligned: int) -> None:
    for dim in range(1, 20):
        for start in range(dim):
            found = box_start(start, dim)
            assert 0 <= start - found < aligned
            if dim - start >= 3:
                assert found == 0 or (dim - found) % aligned == 0
            else:
                assert found == start


def test_boxes_of_real_size_suit_tensor_cores() -> None:
    assert box_start(3277, 4096) == 4096 - 832
    assert box_start(2048, 4096) == 2048, "as it is where that is good"
    assert box_start(3900, 4096) == 3900, "few are not worth it"
    assert box_start(3, 1000) == 0


@pytest.mark.parametrize(("constraint", "m", "n", "k"), CASES)
def test_mixed_sides_fold_and_project_as_dense_ones(
    constraint: Constraint, m: int, n: int, k: int, aligned: int, generator: torch.Generator
) -> None:
    staircase = Staircase.of(constraint, m, n, k, k)
    starts = box_origin(staircase)
    output, input = sides(constraint, m, n, k, generator)
    for left in widened(output, starts[0]):
        for right in widened(input, starts[1]):
            check(FreeSpace(staircase, left, right), generator)


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_what_core_leaves_free_of_protected_directions_is_trained(
    k: int, aligned: int, generator: torch.Generator
) -> None:
    """The form is anybody's choice: these are stored as what is free, though that is more."""
    staircase = Staircase.of("core", 10, 10, k, k)
    bases = [Basis(orthonormal(10, 10, generator)[:, k:], "free") for _ in range(2)]
    sides = [free_side(basis, start) for basis, start in zip(bases, box_origin(staircase), strict=True)]
    space = FreeSpace(staircase, *sides)
    coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in space.shapes]
    update = space.fold(coordinates)
    torch.testing.assert_close(update.norm(), torch.stack([a.norm() for a in coordinates]).norm())
    torch.testing.assert_close(space.project(update), tuple(coordinates), atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", MIXED)
@pytest.mark.parametrize("soft", [False, True])
def test_staircases_fold_and_project_as_dense_ones(
    steps: tuple[tuple[int, int], ...], soft: bool, aligned: int, generator: torch.Generator
) -> None:
    staircase = Staircase(8, 10, steps)
    starts = box_origin(staircase)
    outputs = widened(Basis(orthonormal(8, 6, generator), "leading"), starts[0])
    inputs = widened(Basis(orthonormal(10, 7, generator), "leading"), starts[1])
    gains = None
    if soft:
        gains = (
            torch.rand(8 - starts[0], dtype=torch.float64, generator=generator),
            torch.rand(10 - starts[1], dtype=torch.float64, generator=generator),
        )
    for left in outputs:
        for right in inputs:
            check(FreeSpace(staircase, left, right, gains), generator)


@pytest.mark.parametrize(("constraint", "m", "n", "k"), CASES)
def test_which_side_is_turned_first_does_not_matter(
    constraint: Constraint,
    m: int,
    n: int,
    k: int,
    aligned: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    staircase = Staircase.of(constraint, m, n, k, k)
    starts = box_origin(staircase)
    bases = sides(constraint, m, n, k, generator)
    space = FreeSpace(
        staircase, *(basis and free_side(basis, start) for basis, start in zip(bases, starts, strict=True))
    )
    coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in space.shapes]
    gradient = torch.randn(m, n, dtype=torch.float64, generator=generator)
    found = []
    for outputs_first in (True, False):
        monkeypatch.setattr(FreeSpace, "_output_sees_all", lambda _, answer=outputs_first: answer)
        found.append((space.fold(coordinates), *space.project(gradient)))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


def test_the_cheaper_order_is_taken(generator: torch.Generator) -> None:
    """Few free outputs and many free inputs: reading the outputs first leaves little to do, and the other way round."""
    for outputs, inputs in ((60, 4), (4, 60)):
        staircase = Staircase.of("double", 64, 64, outputs, inputs)
        output = free_side(Basis(orthonormal(64, outputs, generator), "leading"), outputs)
        input = free_side(Basis(orthonormal(64, inputs, generator), "leading"), inputs)
        calls: list[int] = []
        space = FreeSpace(staircase, Counted(output, calls), Counted(input, calls))  # type: ignore[arg-type]
        space.project(torch.randn(64, 64, dtype=torch.float64, generator=generator))
        outputs_first = 64 * output.cost(outputs) + (64 - outputs) * input.cost(inputs)
        inputs_first = 64 * input.cost(inputs) + (64 - inputs) * output.cost(outputs)
        assert sum(calls) == min(outputs_first, inputs_first)
        assert outputs_first != inputs_first


class Counted:
    """A side that counts its multiplications."""

    def __init__(self, side: FreeSide, calls: list[int]) -> None:
        self.side, self.calls = side, calls

    def apply_transposed(self, x: Tensor, start: int) -> Tensor:
        self.calls.append(self.side.cost(start) * x.shape[1])
        return self.side.apply_transposed(x, start)

    def cost(self, start: int) -> int:
        return self.side.cost(start)

    def tensors(self) -> dict[str, Tensor]:
        return self.side.tensors()


@pytest.mark.parametrize("constraint", ["double", "input", "core"])
@pytest.mark.parametrize("k", [32, 96])
def test_bfloat16_bases_are_close_to_wide_ones(constraint: Constraint, k: int, generator: torch.Generator) -> None:
    staircase = Staircase.of(constraint, 128, 160, k, k)
    starts = box_origin(staircase)
    bases = sides(constraint, 128, 160, k, generator)
    wide = FreeSpace(
        staircase, *(basis and free_side(basis, start) for basis, start in zip(bases, starts, strict=True))
    )
    narrow = wide.to(dtype=torch.bfloat16)
    coordinates = [torch.randn(shape, generator=generator) for shape in wide.shapes]
    gradient = torch.randn(128, 160, generator=generator)
    assert narrow.fold(coordinates).dtype == torch.bfloat16
    assert_near(narrow.fold(coordinates), wide.fold([a.double() for a in coordinates]))
    for found, expected in zip(narrow.project(gradient), wide.project(gradient.double()), strict=True):
        assert found.dtype == torch.float32
        assert_near(found, expected)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found.double() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("preserve", ["little", "much", "nothing"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_space_is_put_together_from_its_tensors(preserve: str, soft: bool, generator: torch.Generator) -> None:
    k = {"little": 2, "much": 7, "nothing": 0}[preserve]
    staircase = Staircase.of("double", 8, 10, k, k)
    output, input = sides("double", 8, 10, k, generator)
    gains = None
    if soft:
        gains = torch.rand(8 - k, generator=generator), torch.rand(10 - k, generator=generator)
    space = FreeSpace(staircase, output and free_side(output, k), input and free_side(input, k), gains)
    tensors = {name: tensor.clone() for name, tensor in space.tensors().items()}
    assert len(tensors) == sum(len(side.tensors()) for side in (space.output, space.input) if side) + 2 * soft
    rule = StaircaseRule((8, 10), staircase.steps, side_of(output), side_of(input))
    coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in space.shapes]
    assert rule.shapes == space.shapes
    gradient = torch.randn(8, 10, dtype=torch.float64, generator=generator)
    assert torch.equal(rule.update(gradient, tensors, coordinates), space.fold(coordinates))
    for a, b in zip(rule.project(gradient, tensors, coordinates, gradient), space.project(gradient), strict=True):
        assert torch.equal(a, b)


def test_a_space_without_bases_takes_any_dtype(generator: torch.Generator) -> None:
    space = FreeSpace(Staircase.of("double", 4, 5, 0, 0), None, None)
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(4, 5, dtype=dtype, generator=generator)
        assert torch.equal(space.fold([a]), a)
        assert torch.equal(space.project(a)[0], a)
    assert space.project(torch.ones(4, 5, dtype=torch.bfloat16))[0].dtype == torch.float32
    assert space.tensors() == {}
    assert space.fingerprint() == []


def test_a_frozen_matrix_has_no_update() -> None:
    with pytest.raises(ValueError, match="without free pairs"):
        FreeSpace(Staircase.closed(4, 5), None, None).fold([])
