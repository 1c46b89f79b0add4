"""Completed bases and the coordinates of a free space, against dense float64 references."""

import pytest
import torch
from conftest import frozen_norm
from numerics.sides import CASES, by_group, orthonormal, sides

from sculptor.numerics.bases import Basis, component, store_smaller
from sculptor.numerics.free_space import FreeSpace
from sculptor.numerics.reflectors import CompleteBasis
from sculptor.numerics.staircase import Constraint, Staircase

STEPS = [
    ((1, 7), (3, 5), (5, 2), (8, 0)),
    ((2, 10), (4, 6), (8, 1)),
    ((3, 4), (8, 4)),
    ((1, 6), (6, 3), (8, 2)),
]


def space_of(staircase: Staircase, output: Basis | None, input: Basis | None) -> FreeSpace:
    return FreeSpace(staircase, output and CompleteBasis.of(output), input and CompleteBasis.of(input))


def dense(basis: CompleteBasis) -> torch.Tensor:
    return basis.apply(torch.eye(basis.dim, dtype=basis.reflectors.dtype))


@pytest.mark.parametrize(("d", "c"), [(10, 0), (10, 1), (10, 4), (10, 9), (10, 10), (1, 1)])
@pytest.mark.parametrize("form", ["leading", "free"])
def test_a_completed_basis_is_orthogonal_and_spans_what_is_stored(
    d: int, c: int, form: str, generator: torch.Generator
) -> None:
    vectors = orthonormal(d, c, generator)
    found = CompleteBasis.of(Basis(vectors, form))  # type: ignore[arg-type]
    q = dense(found)
    torch.testing.assert_close(q.T @ q, torch.eye(d, dtype=torch.float64), atol=1e-12, rtol=0)
    for j in range(c + 1):  # nested, direction by direction
        part = q[:, :j] if form == "leading" else q[:, d - c : d - c + j]
        torch.testing.assert_close(part @ part.T, vectors[:, :j] @ vectors[:, :j].T, atol=1e-12, rtol=0)
    x = torch.randn(d, 3, dtype=torch.float64, generator=generator)
    for start in range(d):
        torch.testing.assert_close(found.apply_transposed(x, start), q[:, start:].T @ x, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.apply(x[start:], start), q[:, start:] @ x[start:], atol=1e-12, rtol=0)


def test_a_float32_basis_stays_orthogonal_when_it_is_widened(generator: torch.Generator) -> None:
    found = CompleteBasis.of(Basis(orthonormal(50, 20, generator).float(), "leading"))
    narrow = found.to(dtype=torch.float32)
    wide = dense(narrow.to(dtype=torch.float64))
    torch.testing.assert_close(wide.T @ wide, torch.eye(50, dtype=torch.float64), atol=1e-13, rtol=0)
    assert (dense(narrow).double() - wide).abs().max() < 1e-5


def test_fingerprint_sees_a_flipped_sign_but_not_rounding(generator: torch.Generator) -> None:
    vectors = orthonormal(64, 32, generator)
    first = CompleteBasis.of(Basis(vectors, "leading"))
    rounded = first.to(dtype=torch.float32)
    vectors[:, 30] = torch.randn(64, dtype=torch.float64, generator=generator)
    other = CompleteBasis.of(Basis(vectors, "leading"))
    for start in (0, 10):
        expected = first.fingerprint(start)
        assert max(abs(a - b) for a, b in zip(expected, rounded.fingerprint(start), strict=True)) < 1e-4
        assert max(abs(a - b) for a, b in zip(expected, other.fingerprint(start), strict=True)) > 1e-2


def check_free(staircase: Staircase, output: Basis | None, input: Basis | None, generator: torch.Generator) -> None:
    space = space_of(staircase, output, input)
    coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in space.shapes]
    assert sum(a.numel() for a in coordinates) == staircase.num_free
    update = space.fold(coordinates)
    norm = sum(float(a.square().sum()) for a in coordinates) ** 0.5
    assert float(update.norm()) == pytest.approx(norm, rel=1e-12)
    assert frozen_norm(update, staircase, output, input) < 1e-12 * norm
    for a, b in zip(coordinates, space.project(update), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("constraint", "m", "n", "k"), CASES)
def test_updates_reach_every_free_pair_and_no_frozen_one(
    constraint: Constraint, m: int, n: int, k: int, generator: torch.Generator
) -> None:
    check_free(Staircase.of(constraint, m, n, k, k), *sides(constraint, m, n, k, generator), generator)


@pytest.mark.parametrize("steps", STEPS)
def test_any_staircase_is_trained_exactly(steps: tuple[tuple[int, int], ...], generator: torch.Generator) -> None:
    merged = Staircase(8, 10, steps)
    check_free(
        merged,
        Basis(orthonormal(8, 6, generator), "leading"),
        Basis(orthonormal(10, 7, generator), "leading"),
        generator,
    )


@pytest.mark.parametrize("steps", STEPS)
def test_fold_equals_the_sum_over_row_groups(steps: tuple[tuple[int, int], ...], generator: torch.Generator) -> None:
    staircase = Staircase(8, 10, steps)
    space = space_of(
        staircase, Basis(orthonormal(8, 6, generator), "leading"), Basis(orthonormal(10, 7, generator), "leading")
    )
    assert space.output is not None
    assert space.input is not None
    q_u, q_v = dense(space.output), dense(space.input)
    coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in space.shapes]
    expected = sum(
        q_u[:, group.start : group.stop] @ a @ q_v[:, group.reach :].T
        for group, a in zip(space.groups, by_group(space, coordinates), strict=True)
    )
    torch.testing.assert_close(space.fold(coordinates), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_pairs_are_slowed_down_each_by_its_factor_and_no_frozen_one_moves(
    steps: tuple[tuple[int, int], ...], generator: torch.Generator
) -> None:
    staircase = Staircase(8, 10, steps)
    plain = space_of(
        staircase, Basis(orthonormal(8, 6, generator), "leading"), Basis(orthonormal(10, 7, generator), "leading")
    )
    assert plain.output is not None
    assert plain.input is not None
    h, w = (torch.rand(size, dtype=torch.float64, generator=generator) for size in (8 - plain.first, 10 - plain.least))
    space = FreeSpace(staircase, plain.output, plain.input, (h, w))
    factors = 1 / (1 + h[:, None] * w).sqrt()
    coordinates = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in space.shapes]
    given = [a.clone() for a in coordinates]
    turned = dense(plain.output)[:, plain.first :].T @ plain.fold(coordinates) @ dense(plain.input)[:, plain.least :]
    expected = dense(plain.output)[:, plain.first :] @ (factors * turned) @ dense(plain.input)[:, plain.least :].T
    torch.testing.assert_close(space.fold(coordinates), expected, atol=1e-12, rtol=0)
    assert all(torch.equal(a, was) for a, was in zip(coordinates, given, strict=True))
    gradient = torch.randn(8, 10, dtype=torch.float64, generator=generator)
    pairing = sum(float((a * g).sum()) for a, g in zip(coordinates, space.project(gradient), strict=True))
    assert pairing == pytest.approx(float((expected * gradient).sum()), rel=1e-10)


@pytest.mark.parametrize(("constraint", "m", "n", "k"), CASES)
def test_project_is_the_gradient_of_fold(
    constraint: Constraint, m: int, n: int, k: int, generator: torch.Generator
) -> None:
    space = space_of(Staircase.of(constraint, m, n, k, k), *sides(constraint, m, n, k, generator))
    coordinates = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in space.shapes]
    gradient = torch.randn(m, n, dtype=torch.float64, generator=generator)
    (space.fold(coordinates) * gradient).sum().backward()
    for a, projected in zip(coordinates, space.project(gradient), strict=True):
        torch.testing.assert_close(a.grad, projected, atol=1e-12, rtol=0)


def test_float32_bases_leak_less_than_3e7(generator: torch.Generator) -> None:
    u, v = orthonormal(200, 100, generator).float(), orthonormal(300, 100, generator).float()
    output, input = store_smaller(u), store_smaller(v)
    staircase = Staircase.of("double", 200, 300, 100, 100)
    space = space_of(staircase, output, input)
    held = [side and side.to(dtype=torch.float32).to(dtype=torch.float64) for side in (space.output, space.input)]
    space = FreeSpace(staircase, *held)
    update = space.fold([torch.randn(space.shapes[0], generator=generator, dtype=torch.float64)])
    assert frozen_norm(update, staircase, output, input) / float(update.norm()) < 3e-7


def test_directions_that_are_not_stored_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="none are stored"):
        FreeSpace(Staircase.of("input", 8, 10, 0, 3), None, None)


@pytest.mark.parametrize("k", [3, 7])
def test_component_agrees_with_the_completed_basis(k: int, generator: torch.Generator) -> None:
    whole = orthonormal(10, 10, generator)
    y = torch.randn(10, 4, dtype=torch.float64, generator=generator)
    for basis in (Basis(whole[:, :k], "leading"), Basis(whole[:, k:], "free")):
        q = dense(CompleteBasis.of(basis))
        for start, stop in ((0, k), (k, 10), (0, 10)):
            reference = (q[:, start:stop].T @ y).norm()
            torch.testing.assert_close(component(basis, y, start, stop).norm(), reference, atol=1e-12, rtol=0)
