"""Rotations by Cayley's map, against the formula block by block."""

import pytest
import torch
from torch import Tensor

from sculptor.numerics.rotations import angle_shapes, blocks_of, num_turns, turn, turn_gradient, unexplained_turn


def angles_of(dim: int, size: int, generator: torch.Generator, scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(s, dtype=torch.float64, generator=generator) for s in angle_shapes(dim, size)]


def rotation(dim: int, size: int, angles: list[Tensor]) -> Tensor:
    """(I + Q)(I - Q)^-1, written out."""
    found = torch.eye(dim, dtype=torch.float64)
    start = 0
    for (count, side), values in zip(blocks_of(dim, size), angles, strict=True):
        for block in range(count):
            q = torch.zeros(side, side, dtype=torch.float64)
            at = 0
            for i in range(side):
                for j in range(i + 1, side):
                    q[i, j], q[j, i] = values[block, at], -values[block, at]
                    at += 1
            eye = torch.eye(side, dtype=torch.float64)
            found[start : start + side, start : start + side] = (eye + q) @ torch.linalg.inv(eye - q)
            start += side
    return found


@pytest.mark.parametrize(
    ("dim", "size", "blocks"),
    [
        (12, 4, ((3, 4),)),
        (13, 4, ((3, 4),)),
        (14, 4, ((3, 4), (1, 2))),
        (3, 8, ((1, 3),)),
        (1, 8, ()),
        (0, 2, ()),
    ],
)
def test_blocks(dim: int, size: int, blocks: tuple[tuple[int, int], ...]) -> None:
    assert blocks_of(dim, size) == blocks
    assert angle_shapes(dim, size) == tuple((count, side * (side - 1) // 2) for count, side in blocks)


@pytest.mark.parametrize(("dim", "size"), [(12, 4), (13, 4), (14, 4), (3, 8), (6, 2)])
def test_turning_is_the_formula_and_orthogonal(dim: int, size: int, generator: torch.Generator) -> None:
    y = torch.randn(dim, 5, dtype=torch.float64, generator=generator)
    angles = angles_of(dim, size, generator)
    reference = rotation(dim, size, angles)
    turned = y + turn(y, angles, size)
    torch.testing.assert_close(turned, reference @ y)
    torch.testing.assert_close(turned.T @ turned, y.T @ y)
    assert torch.equal(turned, y + turn(y, angles, size))
    assert float(unexplained_turn(y, turned, size).norm()) < 1e-12 * float(y.norm())


def test_no_angle_is_no_change_at_all(generator: torch.Generator) -> None:
    y = torch.randn(14, 5, generator=generator)
    assert not bool(turn(y, [torch.zeros(s) for s in angle_shapes(14, 4)], 4).any())


@pytest.mark.parametrize(("dim", "size"), [(12, 4), (14, 4), (6, 2)])
def test_gradients(dim: int, size: int, generator: torch.Generator) -> None:
    y, gradient = (torch.randn(dim, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    asked = [a.requires_grad_(True) for a in angles_of(dim, size, generator)]
    expected = torch.autograd.grad((turn(y, asked, size) * gradient).sum(), asked)
    for a, b in zip(turn_gradient(y, [a.detach() for a in asked], size, gradient), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_reflections_and_other_changes_are_not_explained(generator: torch.Generator) -> None:
    y = torch.randn(8, 20, dtype=torch.float64, generator=generator)
    flipped = y.clone()
    flipped[0] *= -1
    assert float(unexplained_turn(y, flipped, 4).norm()) > 0.1
    swapped = y.roll(1, 0)  # a rotation, across blocks
    assert float(unexplained_turn(y, swapped, 4).norm()) > 0.1
    assert float(unexplained_turn(y, 1.001 * y, 4).norm()) == pytest.approx(0.001 * float(y.norm()))


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_independent_changes_are_counted(width: int, generator: torch.Generator) -> None:
    y = torch.randn(9, width, dtype=torch.float64, generator=generator)
    angles = torch.cat([a.flatten() for a in angles_of(9, 4, generator, 0.0)])
    shapes = angle_shapes(9, 4)

    def moved(flat: Tensor) -> Tensor:
        parts = flat.split([a * b for a, b in shapes])
        return turn(y, [part.view(s) for part, s in zip(parts, shapes, strict=True)], 4).flatten()

    jacobian = torch.autograd.functional.jacobian(moved, angles)
    assert int(torch.linalg.matrix_rank(jacobian)) == num_turns(9, width, 4)
