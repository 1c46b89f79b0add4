"""Random bases for the tests of this folder."""

import torch

from sculptor.numerics.bases import Basis, store_smaller
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
