"""Tensors on their way between host and device, and room for them there."""

import torch
from torch import Tensor


def free_bytes(device: torch.device) -> float:
    """What is free on a GPU, and what torch keeps there to use again."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """`tensor.to(device, dtype)`, bit for bit, the narrower of both dtypes on the way.

    Where both change, torch converts on the host: what a GPU needs in float64 would go there as such, in twice the bytes.
    """
    if dtype.itemsize < tensor.dtype.itemsize:
        return tensor.to(dtype).to(device)
    return tensor.to(device).to(dtype)
