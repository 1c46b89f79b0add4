"""Which models are given a mask of padding: attention is slower with one, and padding behind a row is seen by no token before it.

So a causal model reads rows that are padded on the right without, where that was tried and nothing is predicted otherwise.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sculptor.model.positions import turns_at


def reads_mask(model: Any) -> bool:
    """Whether a model is given a mask of rows that are padded on the right; unless `note_mask` has found otherwise, it is."""
    return getattr(model, "_sculptor_reads_mask", True) or turns_at(model) is not None


@torch.no_grad()
def note_mask(model: Any, inputs: Mapping[str, Any], mask: Tensor, logits: Tensor, near: float) -> None:
    """Tries a causal model without a mask.

    Args:
        model: whose attention is torch's; other kernels leave padding out by their mask.
        inputs: padded on the right.
        mask: (B, L) of them, 0 where there is padding.
        logits: (B, L, vocabulary) that it predicts of them with the mask.
        near: how far what it predicts of real tokens without may be from that, as a root mean square.
    """
    model._sculptor_reads_mask = True
    if getattr(model.config.get_text_config(), "_attn_implementation", None) != "sdpa":
        return
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    try:
        found = model(**bare)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it has to have one
        return
    if getattr(found, "aux_loss", None) is None:  # a router's loss is over all tokens that are not masked
        apart = (found.logits.float() - logits)[mask.bool()]
        model._sculptor_reads_mask = not float(apart.square().mean().sqrt()) <= near
