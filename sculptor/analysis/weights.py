"""Protected directions from a weight matrix alone: its leading singular vectors (the paper's choice)."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.numerics.bases import Basis, store_smaller
from sculptor.numerics.linalg import singular_subspaces
from sculptor.numerics.staircase import Constraint, Staircase


@dataclass(frozen=True, eq=False, slots=True)
class MatrixSubspaces:
    """What the analysis of one matrix gives.

    Attributes:
        staircase: which pairs are frozen.
        output, input: the stored sides, float64; None where the constraint needs none.
        spectrum: all singular values (min(m, n),), float64, descending; None if nothing was decomposed.
        energy: share of ||W||^2 in the protected directions.
    """

    staircase: Staircase
    output: Basis | None
    input: Basis | None
    spectrum: Tensor | None
    energy: float


def analyze_matrix(weight: Tensor, constraint: Constraint, k: int) -> MatrixSubspaces:
    """Protects the `k` leading singular directions of a matrix.

    Args:
        weight: (m, n) = (out, in), any floating dtype; decomposed in float64 on its device.
        constraint: what is frozen of them.
        k: how many; 0 decomposes nothing and freezes nothing.
    """
    m, n = weight.shape
    staircase = Staircase.of(constraint, m, n, k, k)
    if k == 0:
        return MatrixSubspaces(staircase, None, None, None, 0.0)
    left, values, right = singular_subspaces(weight, k)
    squares = values.square()
    energy = float(squares[:k].sum() / squares.sum()) if float(squares.sum()) > 0 else 1.0
    return MatrixSubspaces(
        staircase,
        output=None if constraint == "input" else store_smaller(left),
        input=store_smaller(right),
        spectrum=values,
        energy=energy,
    )


def as_out_in(weight: Tensor, transposed: bool) -> Tensor:
    """A stored matrix in the (out, in) form that everything here is about."""
    return weight.T if transposed else weight


def random_directions(weight: Tensor, constraint: Constraint, k: int, seed: str) -> MatrixSubspaces:
    """`k` random directions per side instead of the leading ones: the control that any choice has to beat.

    Args:
        weight: (m, n); only its shape and norms are used.
        constraint: what is frozen of them.
        k: how many.
        seed: any text; the same gives the same directions.
    """
    m, n = weight.shape
    if k == 0:
        return analyze_matrix(weight, constraint, 0)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    left, right = (
        torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))[0].to(weight.device)
        for d in (m, n)
    )
    weight64 = weight.to(torch.float64)
    norm = float(weight64.square().sum())
    return MatrixSubspaces(
        Staircase.of(constraint, m, n, k, k),
        output=None if constraint == "input" else store_smaller(left),
        input=store_smaller(right),
        spectrum=None,
        energy=float((left.T @ weight64 @ right).diagonal().square().sum()) / norm if norm > 0 else 1.0,
    )


def to_device(weight: Tensor, transposed: bool, device: torch.device) -> Tensor:
    """A stored matrix in the (out, in) form, float64, on a device."""
    return as_out_in(weight.to(device=device, dtype=torch.float64), transposed)
