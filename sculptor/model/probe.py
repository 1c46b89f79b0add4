"""A model tried out once, before anything is believed of its loss."""

from typing import Any

import torch

from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.batches import Batch
from sculptor.errors import CheckpointError
from sculptor.model.loss import logits_of

_LENGTH, _CHANGED = 8, 3
# Of the change at the changed tokens themselves, what rounding may make of earlier ones.
_SHARE = 1e-2


@torch.no_grad()
def check_causal(checkpoint: Checkpoint, architecture: Architecture, model: Any, device: torch.device) -> None:
    """Checks that a later token does not move an earlier logit: else predicting the next token means copying it.

    Raises:
        CheckpointError: if it does.
    """
    if architecture.kind != "causal":
        return
    size = max(2, min(97, architecture.vocab_size - 1))
    ids = torch.tensor([[1 + (7 * i) % size for i in range(_LENGTH)]] * 2, device=device)
    ids[1, -_CHANGED:] = 1 + (ids[1, -_CHANGED:] + 2) % size
    logits = logits_of(model, Batch(ids, torch.ones_like(ids), ids), architecture.kind).float()
    difference = (logits[0] - logits[1]).abs().amax(dim=-1)
    early, late = float(difference[:-_CHANGED].max()), float(difference[-_CHANGED:].max())
    if early > _SHARE * late:
        raise CheckpointError(
            f"{checkpoint.path}: {architecture.model_class} is no causal model as it is configured: a later token moves an "
            'earlier prediction; set "is_decoder": true in config.json, or name the class for masked language modelling in '
            '"architectures"'
        )
