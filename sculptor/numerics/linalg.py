"""Singular subspaces, complements and principal angles, all decomposed in float64.

A Gram matrix of the smaller side and a symmetric eigensolver replace the SVD: for W (m, n), m <= n,
W W^T = U S^2 U^T and V = W^T U S^-1. In float64 this squares the condition number without harm (the
leading directions of a weight matrix are far above sqrt(eps64) = 1.5e-8 of the largest); in float32 it
would leak 3e-5 of an update into the protected span.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# A Gram-derived right side this close to orthonormal is used as it is; otherwise a QR makes it so.
_ORTHONORMAL_TOLERANCE64 = 1e-10


class SingularSubspaces(NamedTuple):
    """Leading singular directions of a matrix (m, n), all float64."""

    left: Tensor  # (m, k)
    values: Tensor  # (min(m, n),), descending; those below 1e-8 of the first are noise
    right: Tensor  # (n, k)


def singular_subspaces(weight: Tensor, k: int) -> SingularSubspaces:
    """Leading `k` left and right singular vectors of a matrix, and all its singular values.

    Args:
        weight: (m, n), any floating dtype; computed in float64 on its own device.
        k: how many directions, 0 <= k <= min(m, n).

    Returns:
        Orthonormal `left` (m, k) and `right` (n, k), and `values` (min(m, n),), float64. In every pair the
        entry of `left` with the largest magnitude is positive.

    Raises:
        ValueError: if `weight` is not a matrix or `k` is out of range.
    """
    if weight.ndim != 2 or not 0 <= k <= min(weight.shape):
        raise ValueError(f"expected a matrix and 0 <= k <= its smaller side, got shape {tuple(weight.shape)}, k={k}")
    weight64 = weight.to(torch.float64)
    wide64 = weight64 if weight64.shape[0] <= weight64.shape[1] else weight64.T  # (s, l), s <= l
    eigenvalues, eigenvectors = torch.linalg.eigh(wide64 @ wide64.T)
    values = eigenvalues.flip(0).clamp_min(0).sqrt()
    short = eigenvectors.flip(1)[:, :k]  # (s, k)
    long = _orthonormal_columns(wide64.T @ short)  # (l, k)
    left, right = (short, long) if wide64 is weight64 else (long, short)
    if k:
        peak = left.abs().argmax(dim=0)
        sign = torch.where(left.gather(0, peak[None])[0] < 0, -1.0, 1.0).to(left.dtype)
        left, right = left * sign, right * sign
    return SingularSubspaces(left.contiguous(), values, right.contiguous())


def _orthonormal_columns(columns64: Tensor) -> Tensor:
    """Columns (l, k) that are orthogonal but for rounding, made orthonormal; nested spans are kept."""
    k = columns64.shape[1]
    norms = columns64.norm(dim=0)
    unit64 = columns64 / norms.clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(k, dtype=torch.float64, device=columns64.device)
    if k == 0 or (unit64.T @ unit64 - identity).abs().max() <= _ORTHONORMAL_TOLERANCE64:
        return torch.as_tensor(unit64)
    # Rank-deficient or ill-conditioned: Householder QR is orthonormal whatever the input; its sign is undone.
    q, r = torch.linalg.qr(columns64)
    diagonal = r.diagonal()
    signed: Tensor = q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)
    return signed


def complement(basis: Tensor) -> Tensor:
    """Orthonormal basis of everything orthogonal to the columns of `basis`.

    One Householder factorisation (geqrf), then the reflectors applied to the trailing unit vectors (ormqr).
    The result is fixed by the LAPACK sign convention, so libraries that follow it agree to rounding.

    Args:
        basis: (d, k), k <= d, of full column rank; computed in float64.

    Returns:
        (d, d - k), float64.

    Raises:
        ValueError: if `basis` has more columns than rows.
    """
    d, k = basis.shape
    if k > d:
        raise ValueError(f"a basis of {k} columns does not fit in {d} dimensions")
    trailing = torch.eye(d, dtype=torch.float64, device=basis.device)[:, k:]
    if k in (0, d):
        return trailing
    reflectors, tau = torch.geqrf(basis.to(torch.float64))
    return torch.ormqr(reflectors, tau, trailing)


def orthonormal_prefixes(basis: Tensor) -> Tensor:
    """Orthonormal columns of which the first j span what the first j of `basis` do, for every j (Householder).

    Args:
        basis: (d, k), k <= d, of full column rank; computed in float64.

    Returns:
        (d, k), float64, each column on the side of the one it replaces.
    """
    q, r = torch.linalg.qr(basis.to(torch.float64))
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return signed


def orthonormality_error(basis: Tensor, generator: torch.Generator, probes: int = 4) -> float:
    """How far the columns of `basis` are from orthonormal: max over random z of ||B^T B z - z|| / ||z||.

    A few probes see any wrong column with near certainty at the cost of reading the basis, where the full
    Gram matrix would cost as much as using it.

    Args:
        basis: (d, k), any floating dtype.
        generator: a CPU generator for the probes.
        probes: how many random vectors.

    Returns:
        The largest relative error, 0.0 when `basis` has no columns.
    """
    if basis.shape[1] == 0:
        return 0.0
    z = torch.randn(basis.shape[1], probes, dtype=torch.float64, generator=generator).to(basis.device)
    basis64 = basis.to(torch.float64)
    return float(((basis64.T @ (basis64 @ z) - z).norm(dim=0) / z.norm(dim=0)).max())


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between two subspaces, ascending (Bjorck and Golub 1973).

    Args:
        a: (d, p), orthonormal columns.
        b: (d, q), orthonormal columns.

    Returns:
        (min(p, q),) radians in [0, pi/2], float64; small angles come from sines, large ones from cosines.
    """
    if b.shape[1] > a.shape[1]:
        a, b = b, a
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    overlap = a64.T @ b64
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(b64 - a64 @ overlap).flip(0).clamp(max=1)
    return torch.where(cosines**2 < 0.5, torch.arccos(cosines), torch.arcsin(sines[: cosines.numel()]))


def spectral_norm(matrix: Tensor, iterations: int = 24) -> float:
    """The largest singular value, by power iteration from a fixed random start; from below, near where it stands out.

    Args:
        matrix: (m, n), float64.
        iterations: two products each.
    """
    if not matrix.numel():
        return 0.0
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(tall.shape[1], dtype=torch.float64, generator=generator).to(matrix.device)
    tiny, norm = torch.finfo(torch.float64).tiny, right.new_zeros(())
    for _ in range(iterations):  # on the device: a number here would wait for it each time
        left = tall @ (right / right.norm().clamp_min(tiny))
        norm = left.norm()
        right = tall.T @ (left / norm.clamp_min(tiny))
    return float(norm)
