"""Directions of a matrix's inputs: those that earlier rows use, and what new rows use of all others.

With C = E[x x^T] and the memory M (d, k): DualGPM (Liang and Li 2023, as InfLoRA uses it, arXiv 2404.00228) adds the
fewest leading eigenvectors of (I - M M^T) C (I - M M^T) with which M holds a share of tr C; of k and d - k directions the
fewer are stored. InfLoRA trains along the leading left singular vectors of (I - M M^T) C.
"""

import torch
from torch import Tensor

from sculptor.numerics.bases import Basis, extend
from sculptor.numerics.finite import is_finite
from sculptor.numerics.linalg import complement, orthonormal_prefixes, singular_subspaces
from sculptor.numerics.transfer import moved


def free_columns(memory: Basis | None, dim: int, device: torch.device) -> Tensor:
    """An orthonormal basis (d, d - k) of what is free of the memory, float64."""
    if memory is None:
        return torch.eye(dim, dtype=torch.float64, device=device)
    vectors64 = moved(memory.vectors, device, torch.float64)
    return vectors64 if memory.form == "free" else complement(vectors64)


def grow(moment: Tensor, memory: Basis | None, energy: float) -> tuple[Basis | None, float]:
    """The memory with as many directions more as a share of the moment asks for, and the share that it then holds.

    Args:
        moment: (d, d), symmetric, positive semidefinite; decomposed in float64 on its device.
        memory: of before; what it holds counts.
        energy: share of the trace, above 0, at most 1.

    Raises:
        ValueError: if the moment is not finite.
    """
    if not is_finite(moment):
        raise ValueError("a second moment has NaN or infinite values")
    moment64 = moment.to(torch.float64)
    total = float(moment64.diagonal().sum())
    free64 = free_columns(memory, moment.shape[0], moment.device)
    values, vectors = torch.linalg.eigh(free64.T @ moment64 @ free64)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    held = total - float(values.sum()) + torch.cat([values.new_zeros(1), values.cumsum(0)])  # by directions added
    count = min(int((held < energy * total).sum()), values.numel())
    share = min(1.0, max(0.0, float(held[count]) / total)) if total > 0 else 1.0
    if not count:
        return memory, share
    return extend(_on(memory, moment.device), free64 @ vectors[:, :count], single_cut=True), share


def _on(memory: Basis | None, device: torch.device) -> Basis | None:
    return None if memory is None else memory.to(device, torch.float64)


def leading_free(moment: Tensor, memory: Basis | None, count: int) -> Tensor:
    """The leading left singular vectors (d, count) of (I - M M^T) C, float64; orthogonal to the memory whatever their values.

    Args:
        moment: C (d, d), decomposed in float64 on its device.
        memory: M, or None.
        count: at most as many as there are free directions.
    """
    free64 = free_columns(memory, moment.shape[0], moment.device)
    return free64 @ singular_subspaces(free64.T @ moment.to(torch.float64), count).left


def random_free(memory: Basis | None, dim: int, count: int, generator: torch.Generator) -> Tensor:
    """As many free directions (d, count) by chance, orthonormal, float64, on the CPU."""
    free64 = free_columns(memory, dim, torch.device("cpu"))
    drawn = torch.randn(free64.shape[1], count, dtype=torch.float64, generator=generator)
    orthonormal: Tensor = torch.linalg.qr(drawn)[0]
    return free64 @ orthonormal


def without(memory: Basis | None, directions: Tensor) -> Tensor:
    """Directions (d, r) that were rounded when they were stored, free of the memory as it was stored, orthonormal, float64."""
    found = directions.to(torch.float64)
    if memory is not None:
        vectors64 = memory.vectors.to(found.device, torch.float64)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            inside = vectors64 @ (vectors64.T @ found)
            found = inside if memory.form == "free" else found - inside
    return orthonormal_prefixes(found)
