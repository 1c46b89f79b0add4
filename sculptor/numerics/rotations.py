"""Rotations of groups of directions by Cayley's map: R = (I + Q)(I - Q)^-1, orthogonal for every skew Q.

Directions (d) are turned in blocks of one size, the last of what is left; a block of one stays. What is wanted is the change
(R - I) y, which is 2 (I - Q)^-1 Q y: exactly 0 where Q is. A block's Q is given by the entries above its diagonal, so any
numbers are a rotation, and any rotation without a half turn is given by some.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def blocks_of(dim: int, size: int) -> tuple[tuple[int, int], ...]:
    """(count, size) of the blocks of `dim` directions, in order, as far as they turn anything."""
    whole, rest = divmod(dim, size)
    return tuple((count, side) for count, side in ((whole, size), (1, rest)) if count and side > 1)


def angle_shapes(dim: int, size: int) -> tuple[tuple[int, int], ...]:
    """Of the entries above the diagonal of all Q, by `blocks_of`."""
    return tuple((count, side * (side - 1) // 2) for count, side in blocks_of(dim, size))


def turn(y: Tensor, angles: Sequence[Tensor], size: int) -> Tensor:
    """(R - I) y.

    Args:
        y: (..., d, w).
        angles: (..., count, pairs) of every kind of block, float32 or float64: in that dtype Q is inverted.
        size: of the blocks.

    Returns:
        (..., d, w), in the dtype of the angles.
    """
    out = y.new_zeros(y.shape, dtype=angles[0].dtype)
    for part, turned, found in _blocks(y, out, angles, size):
        skew = _skew(found, part.shape[-2])
        turned.copy_(2 * _solve(skew, skew) @ part)
    return out


def turn_gradient(y: Tensor, angles: Sequence[Tensor], size: int, gradient: Tensor) -> tuple[Tensor, ...]:
    """The gradient of the angles, given that of `turn`'s result: with X = (I - Q)^-1, d(R - I) = 2 X dQ X.

    Args:
        y: (..., d, w).
        angles: as of `turn`.
        size: of the blocks.
        gradient: (..., d, w).
    """
    dtype, found = angles[0].dtype, []
    for part, given, values in _blocks(y, gradient, angles, size):
        side = part.shape[-2]
        of_change = given.to(dtype) @ part.mT  # (..., count, side, side)
        skew = _skew(values, side)
        identity = torch.eye(side, dtype=dtype, device=skew.device).expand_as(skew)
        inverse = _solve(skew, identity)
        of_skew = 2 * inverse.mT @ of_change @ inverse.mT
        rows, columns = torch.triu_indices(side, side, 1, device=skew.device)
        found.append((of_skew - of_skew.mT)[..., rows, columns].contiguous())
    return tuple(found)


def unexplained_turn(y: Tensor, turned: Tensor, size: int) -> Tensor:
    """turned - R y for the block-diagonal rotation R that comes nearest (orthogonal Procrustes), float64.

    Args:
        y, turned: (d, w), float64.
        size: of the blocks.
    """
    off = turned - y
    start = 0
    for count, side in blocks_of(y.shape[0], size):
        before, after = (_split(x, start, count, side) for x in (y, turned))
        _split(off, start, count, side).copy_(after - _nearest(after @ before.mT) @ before)
        start += count * side
    return off


def num_turns(dim: int, width: int, size: int) -> int:
    """How many independent changes of y (d, w) turns make, where w is small against the blocks fewer than angles."""
    return sum(
        count * (_pairs(side) - (_pairs(side - width) if width < side else 0)) for count, side in blocks_of(dim, size)
    )


def _pairs(side: int) -> int:
    return side * (side - 1) // 2


def _blocks(y: Tensor, other: Tensor, angles: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For every kind of block: of y in the dtype of the angles, of another (d, w) as it is, a view, and the angles."""
    start = 0
    for (count, side), values in zip(blocks_of(y.shape[-2], size), angles, strict=True):
        part, there = (_split(x, start, count, side) for x in (y, other))
        yield part.to(values.dtype), there, values
        start += count * side


def _split(x: Tensor, start: int, count: int, side: int) -> Tensor:
    """Rows from `start` on as (..., count, side, w), a view."""
    return x[..., start : start + count * side, :].view(*x.shape[:-2], count, side, x.shape[-1])


def _skew(angles: Tensor, side: int) -> Tensor:
    """Q (..., side, side)."""
    rows, columns = torch.triu_indices(side, side, 1, device=angles.device)
    upper = angles.new_zeros(*angles.shape[:-1], side, side)
    upper[..., rows, columns] = angles
    return upper - upper.mT


def _solve(skew: Tensor, right: Tensor) -> Tensor:
    """(I - Q)^-1 right; I - Q has no eigenvalue below 1 in magnitude."""
    found: Tensor = torch.linalg.solve(torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device) - skew, right)
    return found


def _nearest(product: Tensor) -> Tensor:
    """The rotations R (..., s, s) with the largest tr(R^T product): no reflections, which Cayley's map cannot make."""
    left, _, right = torch.linalg.svd(product)
    flip = torch.ones_like(product[..., 0])
    flip[..., -1] = torch.linalg.det(left @ right).sign()
    found: Tensor = (left * flip[..., None, :]) @ right
    return found
