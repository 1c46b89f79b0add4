"""Singular subspaces and complements against float64 references and by their properties."""

import pytest
import torch

from sculptor.numerics.linalg import (
    complement,
    orthonormality_error,
    principal_angles,
    singular_subspaces,
    spectral_norm,
)
from sculptor.numerics.rounding import noise_spectrum

SHAPES = [(6, 6), (5, 9), (9, 5), (1, 7), (7, 1), (64, 40)]


def random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_subspaces_equal_the_svd(shape: tuple[int, int], generator: torch.Generator) -> None:
    weight = random(shape, generator)
    k = max(1, min(shape) // 2)
    found = singular_subspaces(weight, k)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(found.values, s, atol=1e-7, rtol=1e-9)
    for mine, reference in ((found.left, u[:, :k]), (found.right, vh[:k].T)):
        assert (mine @ mine.T - reference @ reference.T).norm() < 1e-9
    torch.testing.assert_close(found.left.T @ weight @ found.right, torch.diag(s[:k]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_subspaces_are_orthonormal_and_repeatable(shape: tuple[int, int], generator: torch.Generator) -> None:
    weight = random(shape, generator).to(torch.bfloat16)
    k = min(shape)
    first, second = singular_subspaces(weight, k), singular_subspaces(weight, k)
    for basis in (first.left, first.right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_projector_of_float32_bases_is_within_1e6_of_float64(generator: torch.Generator) -> None:
    weight = random((96, 160), generator)
    u, _, vh = torch.linalg.svd(weight)
    found = singular_subspaces(weight.to(torch.float64), 48)
    for mine, reference in ((found.left, u[:, :48]), (found.right, vh[:48].T)):
        stored = mine.float().double()
        error = torch.linalg.matrix_norm(stored @ stored.T - reference @ reference.T, 2)
        assert error < 1e-6


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_matrices_still_give_orthonormal_sides(rank: int, generator: torch.Generator) -> None:
    weight = random((8, rank), generator) @ random((rank, 12), generator)
    found = singular_subspaces(weight, 6)
    for basis in (found.left, found.right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)


def test_ill_conditioned_spectrum_keeps_nested_subspaces(generator: torch.Generator) -> None:
    u, _ = torch.linalg.qr(random((30, 30), generator))
    v, _ = torch.linalg.qr(random((40, 30), generator))
    weight = u @ torch.diag(torch.logspace(0, -9, 30, dtype=torch.float64)) @ v.T
    found = singular_subspaces(weight, 30)
    torch.testing.assert_close(found.right.T @ found.right, torch.eye(30, dtype=torch.float64), atol=1e-9, rtol=0)
    leading = found.right[:, :8]
    assert (leading @ leading.T - v[:, :8] @ v[:, :8].T).norm() < 1e-6


def test_singular_subspaces_refuse_wrong_input() -> None:
    with pytest.raises(ValueError, match="expected a matrix"):
        singular_subspaces(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="k=4"):
        singular_subspaces(torch.zeros(3, 5), 4)


@pytest.mark.parametrize(("d", "k"), [(5, 0), (5, 2), (5, 5), (40, 13), (1, 1)])
def test_complement_completes_the_basis(d: int, k: int, generator: torch.Generator) -> None:
    basis = torch.linalg.qr(random((d, k), generator))[0]
    rest = complement(basis)
    whole = torch.cat([basis, rest], dim=1)
    torch.testing.assert_close(whole.T @ whole, torch.eye(d, dtype=torch.float64), atol=1e-12, rtol=0)
    reference = torch.eye(d, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(rest @ rest.T, reference, atol=1e-12, rtol=0)
    assert torch.equal(rest, complement(basis))


def test_complement_refuses_too_many_columns() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        complement(torch.zeros(2, 3))


def test_principal_angles_equal_known_rotations() -> None:
    angles = torch.tensor([1e-9, 1e-3, 0.5, 1.5], dtype=torch.float64)
    a = torch.eye(8, 4, dtype=torch.float64)
    b = torch.cat([torch.diag(angles.cos()), torch.diag(angles.sin())])
    torch.testing.assert_close(principal_angles(a, b), angles, atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(principal_angles(b, a), angles, atol=1e-12, rtol=1e-6)
    assert principal_angles(a, a[:, :2]).abs().max() == 0
    assert principal_angles(a, a[:, :0]).numel() == 0


@pytest.mark.parametrize("column", [0, 30, 63])
def test_orthonormality_error_sees_one_wrong_column(column: int, generator: torch.Generator) -> None:
    basis = torch.linalg.qr(random((128, 64), generator))[0]
    assert orthonormality_error(basis.float(), torch.Generator().manual_seed(1)) < 1e-6
    basis[:, column] *= 1.01
    assert orthonormality_error(basis, torch.Generator().manual_seed(1)) > 1e-5
    assert orthonormality_error(basis[:, :0], generator) == 0


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (1, 9), (0, 5)])
def test_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int], generator: torch.Generator) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=generator)
    if matrix.numel():
        matrix += 10 * torch.outer(torch.ones(shape[0]), torch.ones(shape[1])) / (shape[0] * shape[1]) ** 0.5
    expected = float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0
    assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-3)
    assert spectral_norm(torch.zeros(3, 2, dtype=torch.float64)) == 0.0


def test_the_spectrum_of_noise_is_bounded(generator: torch.Generator) -> None:
    deviations = torch.rand(200, 150, dtype=torch.float64, generator=generator) + 0.1
    noise = deviations * torch.randn(200, 150, dtype=torch.float64, generator=generator)
    bound = noise_spectrum(deviations.square())
    assert 0.7 * bound < float(torch.linalg.matrix_norm(noise, 2)) < 1.05 * bound
