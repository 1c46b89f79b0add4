"""Random bases for the tests of this folder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sculptor.numerics.bases import Basis, store_smaller
from sculptor.numerics.free_space import FreeSpace
from sculptor.numerics.staircase import Constraint

CASES = [
    (constraint, m, n, k)
    for constraint in ("double", "input", "core")
    for m, n, k in ((8, 8, 3), (8, 8, 6), (6, 20, 5), (20, 6, 2), (5, 7, 0))
]


def orthonormal(d: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0][:, :k]


def sides(
    constraint: Constraint, m: int, n: int, k: int, generator: torch.Generator
) -> tuple[Basis | None, Basis | None]:
    u, v = orthonormal(m, k, generator), orthonormal(n, k, generator)
    if k == 0:
        return None, None
    return (None if constraint == "input" else store_smaller(u)), store_smaller(v)


def by_group(space: FreeSpace, coordinates: Sequence[Tensor]) -> list[Tensor]:
    """A_g (p, q) of every row group."""
    if not coordinates:
        return []
    sizes = [(group.stop - group.start, space.staircase.columns - group.reach) for group in space.groups]
    parts = coordinates[0].reshape(-1).split([p * q for p, q in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]
