"""What a model is multiplied in while it trains."""

from contextlib import AbstractContextManager

import torch

from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import SettingsError
from sculptor.numerics.precision import multiplies_bfloat16
from sculptor.training.settings import Precision

# On two cores with instructions for bfloat16 SmolLM2's products take a third of the time; those of tiny models gain nothing.
_LARGE = 50_000_000


def decide_precision(precision: Precision, checkpoint: Checkpoint, device: torch.device) -> Precision:
    """float32 or bfloat16: as asked, or what suits model and device.

    Raises:
        SettingsError: for float32 on a GPU, where models are loaded as they are stored.
    """
    if precision == "float32" and device.type == "cuda":
        raise SettingsError("--precision float32: a GPU trains in bfloat16; give --device cpu, or leave it out")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16"
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes // info.dtype.itemsize
    stored = max(sizes, key=sizes.__getitem__) == torch.bfloat16
    return "bfloat16" if stored and sum(sizes.values()) >= _LARGE and multiplies_bfloat16(device) else "float32"


def autocast(precision: Precision, device: torch.device, *, cached: bool = True) -> AbstractContextManager[object]:
    """What a model computes in: bfloat16 products where weights that are trained are multiplied so, nothing lowered else.

    Args:
        precision: as decided.
        device: where.
        cached: whether casts of weights are kept for as long as it is entered.
    """
    enabled = compute_dtype(precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=cached)


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of weights that are trained, as they are multiplied; where nothing was decided, bfloat16 on a GPU alone."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
