"""Which devices compute exactly enough, and how float32 products are formed on a GPU, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def why_not(device: torch.device) -> str | None:
    """Why a device will not do; None for a CPU, and for GPUs of CUDA or ROCm, both of which torch calls cuda."""
    if device.type in ("cpu", "cuda"):
        return None
    if device.type == "mps":
        return "Apple's GPUs have no float64, which the decompositions and the merge need"
    if device.type == "hip":
        return "torch calls the GPUs of ROCm cuda"
    return "neither a CPU nor a GPU of CUDA or ROCm"


@contextmanager
def float32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """TF32 or full float32 matrix products on a GPU, whatever the process is set to; autocast is off.

    TF32 is exact for factors that came from bf16, and enough where exactness lives elsewhere. A CPU always
    multiplies in full.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
