"""Kernels of a CPU: kept for shapes that come again, and chosen for attention inside short rows."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# oneDNN compiles products of bfloat16 for every shape, in milliseconds where small ones run for tenths of one, and keeps 1,024. A
# model whose matrices leave differently many directions free has hundreds of them for every length of rows.
_KEPT = 4096
_MULTIPLE = 8
# Up to so many tokens torch's backward pass of attention in bfloat16 takes longer than two products and a softmax.
_SHORT = 128


def keep_kernels() -> None:
    """Lets oneDNN keep enough compiled products, unless somebody has said how many; it asks at its first one."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KEPT))


def multiple_of_lengths(device: torch.device, dtype: torch.dtype) -> int:
    """What rows had better be padded to a multiple of, so that shapes come again."""
    return _MULTIPLE if _is_compiled(device, dtype) else 1


def attention(device: torch.device, dtype: torch.dtype, length: int) -> AbstractContextManager[object]:
    """Around forward and backward passes of rows of a length, which chooses how attention is computed."""
    return sdpa_kernel(SDPBackend.MATH) if writes_scores(device, dtype, length) else nullcontext()


def writes_scores(device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether `attention` has a number for each two tokens of a row in memory."""
    return _is_compiled(device, dtype) and length <= _SHORT


def _is_compiled(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16
