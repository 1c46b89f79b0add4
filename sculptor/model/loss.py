"""The summed cross-entropy of a batch: the same for training and evaluation.

Models are called without labels, so that the sum can be divided by the tokens of a whole optimizer step, and
logits are made only where there is loss, where the model can do that.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sculptor.checkpoint.architecture import Kind
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED


class BatchLoss(NamedTuple):
    """Sums over a batch.

    Attributes:
        total: summed cross-entropy, in nats, float32; carries the graph.
        num_tokens: how many tokens it is summed over.
        auxiliary: the model's own extra loss (a router's), already weighted, or None.
    """

    total: Tensor
    num_tokens: int
    auxiliary: Tensor | None


def num_loss_tokens(batch: Batch, kind: Kind) -> int:
    """Tokens that carry loss: a decoder never predicts the first token of a sequence."""
    labels = batch.labels[:, 1:] if kind == "causal" else batch.labels
    return int((labels != IGNORED).sum())


def batch_loss(model: Any, batch: Batch, kind: Kind) -> BatchLoss:
    """Cross-entropy of a batch that is on the model's device.

    Args:
        model: a transformers model with a language-modelling head.
        batch: padded on the right.
        kind: how its labels are to be read.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    labels = batch.labels
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    if kind == "causal":
        labels = labels[:, 1:]
        columns = (labels != IGNORED).any(dim=0).nonzero().flatten()
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = columns
            labels = labels[:, columns]
    outputs = model(**inputs)
    logits = outputs.logits
    if kind == "causal" and "logits_to_keep" not in inputs:
        logits = logits[:, :-1]
    wanted = labels != IGNORED
    total = nn.functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum")
    return BatchLoss(total, int(wanted.sum()), _auxiliary(model, outputs))


def _auxiliary(model: Any, outputs: Any) -> Tensor | None:
    auxiliary = getattr(outputs, "aux_loss", None)
    weight = getattr(model, "router_aux_loss_coef", None)
    if weight is None:
        weight = getattr(model.config, "router_aux_loss_coef", 0.0)
    return auxiliary * weight if isinstance(auxiliary, torch.Tensor) and weight else None
