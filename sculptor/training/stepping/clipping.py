"""What gradients are divided by, so that their norm keeps to a limit: all by one number, or each matrix's by its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sculptor.training.stepping.block import Divisors, StreamedBlock


def divisor(norm: Tensor, limit: float) -> Tensor:
    """What gradients with this norm are divided by, so that it is at most `limit`.

    As `torch.nn.utils.clip_grad_norm_` has it, the other way round: AdamW can divide gradients as it reads them.
    """
    return torch.clamp((norm + 1e-6) / limit, min=1.0)


def clip(
    blocks: Sequence[StreamedBlock],
    own: Sequence[Tensor],
    norms: Sequence[Tensor],
    total: Tensor,
    limit: float,
    apart: bool,
) -> Divisors:
    """Divides gradients that are on the device, and says what those of blocks are to be divided by.

    Args:
        blocks: whose gradients wait.
        own: gradients of openly trained parameters, with these `norms`.
        total: norm of all.
        limit: the largest norm; 0 for none.
        apart: whether each matrix and parameter is clipped by itself.
    """
    if not limit:
        return Divisors()
    whole = divisor(total, limit)
    for gradient, norm in zip(own, norms, strict=True):
        gradient.div_(divisor(norm, limit) if apart else whole)
    return Divisors(by_matrix=by_matrix(blocks, limit)) if apart else Divisors(whole)


def by_matrix(blocks: Sequence[StreamedBlock], limit: float) -> dict[str, Tensor]:
    """What the gradients of each matrix are divided by, when matrices are clipped one by one."""
    return {
        matrix.name: divisor(torch.linalg.vector_norm(torch.stack([block.norms[key] for key in matrix.keys])), limit)
        for block in blocks
        for matrix in block.matrices
        if matrix.touched
    }
