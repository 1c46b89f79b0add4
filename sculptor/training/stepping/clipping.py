"""What gradients are divided by, so that their norm keeps to a limit: all by one number, or each matrix's by its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sculptor.training.stepping.block import StreamedBlock

# What gradients are divided by: each matrix's by its own, all by one, or none.
Divisors = Mapping[str, Tensor] | Tensor | None


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
        return None
    whole = divisor(total, limit)
    for gradient, norm in zip(own, norms, strict=True):
        gradient.div_(divisor(norm, limit) if apart else whole)
    return by_matrix(blocks, limit) if apart else whole


def by_matrix(blocks: Sequence[StreamedBlock], limit: float) -> dict[str, Tensor]:
    """What the gradients of each matrix are divided by, when matrices are clipped one by one."""
    return {
        matrix.name: divisor(torch.linalg.vector_norm(torch.stack([block.norms[key] for key in matrix.keys])), limit)
        for block in blocks
        for matrix in block.matrices
        if matrix.touched
    }


def chosen(divisors: Divisors, name: str) -> Tensor | None:
    """What the gradients of a matrix are divided by."""
    return divisors if divisors is None or isinstance(divisors, Tensor) else divisors[name]


def on_cpu(divisors: Divisors) -> Divisors:
    """The same in host memory; waits for the device."""
    if divisors is None or isinstance(divisors, Tensor):
        return divisors if divisors is None else divisors.cpu()
    return {name: value.cpu() for name, value in divisors.items()}
