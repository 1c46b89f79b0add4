"""How much of an update the storage dtype can hold.

Rounding to the nearest adds to each entry an error spread evenly over one unit in the last place, of variance
ulp(W')^2 / 12, so ||error|| is about ||ulp(W')||_F / sqrt(12). What of it falls on frozen pairs is in
`bases.frozen_variance`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A leak up to this share of ||dW|| is the float32 rounding of the stored bases.
LEAK_FLOOR = 1e-6
# The measured rounding may exceed its expectation by this much.
ROUNDING_SLACK = 1.25
_PIECE = 2**15


def ulp(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The gap between a number and its next neighbour in a dtype (default: that of `values`), as float64."""
    finfo = torch.finfo(dtype or values.dtype)
    # Below the smallest normal number, zero included, gaps stay the same.
    magnitude = values.to(torch.float64).abs().clamp_min(finfo.tiny)
    exponent = torch.frexp(magnitude)[1] - 1  # |w| in [2^e, 2^(e+1))
    return finfo.eps * torch.exp2(exponent.to(torch.float64))


def rounding_variance(values: Tensor, dtypes: Sequence[torch.dtype] | None = None) -> Tensor:
    """Variance per entry of the error of storing `values` once in each dtype (default: once in their own), float64."""
    nothing = torch.zeros((), dtype=torch.float64, device=values.device)
    return sum((ulp(values, dtype).square() / 12.0 for dtype in dtypes or [values.dtype]), start=nothing)


def leak_allowance(rounding: float, num_frozen: int, update: float = 0.0) -> float:
    """The largest leak that rounding explains: sqrt(1e-6^2 + (slack rounding)^2), all relative to ||dW||.

    Of an `update` larger than the matrix, ||dW|| / ||W|| > 1, the first is a share of ||W||: else a large update in free
    directions would hide any change in the others.

    The norm of `num_frozen` independent errors varies by 1 / sqrt(2 num_frozen) around its expectation; four of
    these exceed the slack of 1.25 only where fewer than 128 pairs are frozen.
    """
    slack = max(ROUNDING_SLACK, 1 + 4 / math.sqrt(2 * max(1, num_frozen)))
    return math.hypot(LEAK_FLOOR / max(1.0, update), slack * rounding)


def peak_allowance(update: float, weight: float, rounding: float, num_frozen: int) -> float:
    """The largest spectral norm of a leak that rounding explains, in the units of ||dW|| and ||W||; as `leak_allowance`."""
    slack = max(ROUNDING_SLACK, 1 + 4 / math.sqrt(2 * max(1, num_frozen)))
    return math.hypot(LEAK_FLOOR * min(update, weight), slack * rounding)


def rms(values: Tensor) -> float:
    """Root mean square of all entries, summed in float64; on a CPU the same bits with any number of threads."""
    flat = values.detach().reshape(-1)
    if flat.device.type == "cpu":  # in pieces that stay in its caches, and that one thread adds up
        square = sum((float(piece.to(torch.float64).square().sum()) for piece in torch.split(flat, _PIECE)), start=0.0)
    else:
        square = float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
    return math.sqrt(square / max(1, values.numel()))


def noise_spectrum(variance: Tensor) -> float:
    """What the spectral norm of independent errors comes to: the largest row plus the largest column, by standard deviations.

    Bandeira and van Handel, arXiv 1408.6185, theorem 1.1, without its small last term.

    Args:
        variance: (m, n), float64, of each entry.
    """
    return float(variance.sum(dim=1).max().sqrt() + variance.sum(dim=0).max().sqrt())
