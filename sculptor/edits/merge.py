"""The one merge: coordinates folded into a matrix in float64, in bases read anew from the archive, rounded once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sculptor.archive.store import Entry
from sculptor.checkpoint.orientation import as_out_in, to_device
from sculptor.errors import TrainingError
from sculptor.methods.rule import Working
from sculptor.numerics.finite import is_finite

FINGERPRINT_TOLERANCE = 1e-4  # rounding is near 1e-6, another basis near 1


class Merged(NamedTuple):
    """A matrix after an update.

    Attributes:
        tensor: as the checkpoint stores it, in the dtype asked for.
        update: dW (m, n) before rounding, float64.
    """

    tensor: Tensor
    update: Tensor


@torch.no_grad()
def merge_matrix(
    entry: Entry,
    coordinates: Sequence[Tensor],
    weight: Tensor,
    dtype: torch.dtype,
    *,
    soften: float,
    fingerprint: Sequence[float],
) -> Merged:
    """W0 + dW, computed where the coordinates are. An entry of W0 that dW does not change keeps its bits.

    Args:
        entry: of the archive that was trained with.
        coordinates: A, as they were trained.
        weight: W0 as stored.
        dtype: to round to.
        soften: as in training.
        fingerprint: of the tensors that were trained with.

    Raises:
        TrainingError: if the archive's tensors are not, up to rounding, those that were trained with, or the sum does not
            fit the dtype.
    """
    device, record = coordinates[0].device, entry.record
    prepared = entry.rule.prepare(entry.tensors, Working(device, torch.float64, soften, record.tensors))
    if not same_fingerprint(prepared.fingerprint, fingerprint):
        raise TrainingError(
            f"{record.name}: its bases complete differently than when training began; merge on the device and with the "
            "library that trained"
        )
    weight64 = to_device(weight, record.transposed, device)
    update = entry.rule.update(weight64, prepared.tensors, [a.detach().to(torch.float64) for a in coordinates])
    merged64 = torch.where(update == 0, weight64, weight64 + update)  # -0 + 0 would be 0
    # To bf16 and float16 PyTorch goes through float32: a few of 100,000 values become the second nearest.
    merged = as_out_in(merged64, record.transposed).to(dtype).contiguous()
    if not is_finite(merged):
        raise TrainingError(f"{record.name}: merged values overflow {dtype}; use --save-dtype float32")
    return Merged(merged, update)


def same_fingerprint(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same bases, rounding aside."""
    return len(found) == len(expected) and all(
        abs(x - y) <= FINGERPRINT_TOLERANCE for x, y in zip(found, expected, strict=True)
    )
