"""The leak of one matrix: what its rule forbids of W' - W, and what rounding explains of that; all in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.archive.store import Entry
from sculptor.checkpoint.orientation import as_out_in, to_device
from sculptor.methods.rule import Detail, Violation
from sculptor.numerics.rounding import rounding_variance


@dataclass(frozen=True, slots=True)
class LeakMeasure:
    """One matrix's update: its norm, that of the rounding errors to expect in it, and what the rule says of it."""

    update: float
    rounding: float
    violation: Violation
    detail: Detail


def measure_leak(
    base: Tensor,
    tuned: Tensor,
    entry: Entry,
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None = None,
    *,
    detailed: bool = True,
) -> LeakMeasure:
    """Measures one matrix, both given as stored.

    Args:
        base, tuned: before and after.
        entry: of the archive.
        device: where the float64 products run.
        dtypes: what the tuned one was rounded to, once each.
        detailed: False for sizes alone, in a fraction of the time.
    """
    transposed = entry.record.transposed
    base64, tuned = to_device(base, transposed, device), tuned.to(device)
    update64 = to_device(tuned, transposed, device) - base64
    variance = as_out_in(rounding_variance(tuned, dtypes), transposed)
    found = entry.rule.violation(entry.tensors, base64, update64, variance)
    return LeakMeasure(
        update=float(update64.norm()),
        rounding=math.sqrt(float(variance.sum())),
        violation=found._replace(detail=Detail),  # which would keep the matrix
        detail=found.detail() if detailed else Detail(),
    )
