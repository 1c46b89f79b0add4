"""EL2N: how wrong a prediction is, as the length of the loss's gradient by its logits (arXiv 2107.07075)."""

import torch
from torch import Tensor


def error_norms(logits: Tensor, labels: Tensor) -> Tensor:
    """||p - y|| of every token, y being 1 at its label.

    Args:
        logits: (t, v), of any dtype.
        labels: (t,).

    Returns:
        (t,), float32 or wider.
    """
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    right = p.gather(-1, labels[:, None])[:, 0]
    # (1 - p_y)^2 takes the place of p_y^2.
    return (p.square().sum(dim=-1) + (1 - 2 * right)).clamp(min=0).sqrt()
