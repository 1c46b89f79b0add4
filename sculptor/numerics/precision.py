"""Which devices compute exactly enough, which multiply bfloat16, and how float32 products are formed on a GPU, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # instructions of x86 and ARM


def why_not(device: torch.device) -> str | None:
    """Why a device will not do; None for a CPU, and for GPUs of CUDA or ROCm, both of which torch calls cuda."""
    if device.type in ("cpu", "cuda"):
        return None
    if device.type == "mps":
        return "Apple's GPUs have no float64, which the decompositions and the merge need"
    if device.type == "hip":
        return "torch calls the GPUs of ROCm cuda"
    return "neither a CPU nor a GPU of CUDA or ROCm"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are what a device is fast at: a GPU, and a CPU that has instructions for them."""
    if device.type == "cuda":
        return True
    # torch 2.11 has no list of them, but asks for one by one
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return any(capabilities.get(name) is True for name in _BFLOAT16) or (not capabilities and bool(asked()))


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
