"""The summed cross-entropy of a batch: the same for training and evaluation.

Models are called without labels, so that the sum can be divided by the tokens of a whole optimizer step, and
logits are made only where there is loss, where the model can do that. Many of them never exist at once: the tokens go
through the model's own head in slices (`sculptor.model.head`), each made again in the backward pass.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sculptor.checkpoint.architecture import ModelKind
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED
from sculptor.model.head import Head, find_head
from sculptor.model.masks import reads_mask
from sculptor.numerics.divergence import divergence
from sculptor.numerics.el2n import error_norms
from sculptor.numerics.entropy import entropy_weights

# Makes a model compute with its base's weights for as long as it is entered.
AsBase = Callable[[], AbstractContextManager[object]]
# What each token's loss is multiplied by (B, L), of labels in the place of the logits that predict them.
Weigh = Callable[[Tensor], Tensor]
# Logits that exist at a time, in elements.
SLICE = {"cuda": 2**25, "cpu": 2**23}

# What weighs the loss of a router.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


class BatchLoss(NamedTuple):
    """Sums over a batch.

    Attributes:
        total: summed cross-entropy, in nats, float32; carries the graph.
        num_tokens: how many tokens it is summed over.
        auxiliary: the model's own extra loss (a router's), already weighted, or None.
        divergence: summed KL(base || new), in nats, with the graph; None unless it was asked for.
    """

    total: Tensor
    num_tokens: int
    auxiliary: Tensor | None
    divergence: Tensor | None = None


def num_loss_tokens(batch: Batch, kind: ModelKind) -> int:
    """Tokens that carry loss, rows for a classifier: a decoder never predicts the first token of a sequence."""
    return int((_read_labels(batch, kind) != IGNORED).sum())


def batch_loss(
    model: Any,
    batch: Batch,
    kind: ModelKind,
    *,
    by_entropy: bool = False,
    as_base: AsBase | None = None,
    weigh: Weigh | None = None,
) -> BatchLoss:
    """Cross-entropy of a batch that is on the model's device; with `as_base` KL(base || new) on the same tokens, too.

    Args:
        model: a transformers model with a language-modelling head, or one that classifies sequences.
        batch: padded on the right.
        kind: how its labels are to be read.
        by_entropy: weight each token by the entropy of its prediction (`numerics.entropy`).
        as_base: takes one more forward, without gradients, of the same model with the base's weights.
        weigh: says what each token's loss is multiplied by.
    """
    all_labels = _read_labels(batch, kind)
    wanted = all_labels != IGNORED
    labels = all_labels[wanted]
    weights = None if weigh is None else weigh(all_labels)[wanted]
    rows = max(1, SLICE[labels.device.type] // int(model.get_input_embeddings().weight.shape[0]))
    head = find_head(model, kind) if labels.numel() > rows else None

    def read() -> tuple[Any, Tensor]:
        """The model's outputs, and of every token with loss its logits, or what a head makes them of."""
        if head is None:
            return _predict(model, batch, kind)[:2]
        with head.kept_out() as kept:
            outputs = model(**inputs_of(model, batch, kind))
        return outputs, kept[0][:, : wanted.shape[1]][wanted]

    known = None
    if as_base is not None:
        with torch.no_grad(), as_base():
            known = read()[1]
    outputs, found = read()
    if head is None:
        sums = _sums(found, labels, known, weights, by_entropy)
    else:
        each = [found, labels, known, weights]
        parts = ([None] * -(-len(labels) // rows) if part is None else torch.split(part, rows) for part in each)
        slices = [_slice_sums(head, as_base, by_entropy, *part) for part in zip(*parts, strict=True)]
        sums = torch.stack(slices).sum(dim=0)
    apart = sums[1] if as_base is not None else None
    return BatchLoss(sums[0], labels.numel(), _auxiliary(model, outputs), apart)


def _sums(logits: Tensor, labels: Tensor, known: Tensor | None, weights: Tensor | None, by_entropy: bool) -> Tensor:
    """Over some tokens: cross-entropy and, where the base's logits are known, KL(base || new)."""
    if by_entropy:
        weights = entropy_weights(logits) * (1.0 if weights is None else weights)
    each = nn.functional.cross_entropy(logits.float(), labels, reduction="sum" if weights is None else "none")
    total = each if weights is None else (weights * each).sum()
    return torch.stack([total] if known is None else [total, divergence(known, logits).sum()])


def _slice_sums(
    head: Head,
    as_base: AsBase | None,
    by_entropy: bool,
    hidden: Tensor,
    labels: Tensor,
    before: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """`_sums` of hidden states; `before` are the base's."""

    def sums(hidden: Tensor) -> Tensor:
        known = None
        if before is not None and as_base is not None:
            with torch.no_grad(), as_base():
                known = head.logits(before)
        return _sums(head.logits(hidden), labels, known, weights, by_entropy)

    if not torch.is_grad_enabled():
        return sums(hidden)
    found: Tensor = checkpoint(sums, hidden, use_reentrant=False)
    return found


def sample_labels(model: Any, batch: Batch, kind: ModelKind, generator: torch.Generator) -> Batch:
    """The batch with every label that carries loss drawn anew from the model's own prediction.

    Args:
        model: as for `batch_loss`.
        batch: on the model's device; what the model reads stays.
        kind: how its labels are to be read.
        generator: of the model's device.
    """
    _, logits, wanted = _predict(model, batch, kind)
    drawn = torch.multinomial(logits.float().softmax(dim=-1), 1, generator=generator)[:, 0]
    labels = batch.labels.clone()
    _read_labels(replace(batch, labels=labels), kind)[wanted] = drawn  # a view of them
    return replace(batch, labels=labels)


def predictions(model: Any, batch: Batch, kind: ModelKind) -> Tensor:
    """Logits (tokens with loss, vocabulary) of a batch that is on the model's device, row by row."""
    return _predict(model, batch, kind)[1]


def row_errors(model: Any, batch: Batch, kind: ModelKind) -> Tensor:
    """Mean over the tokens with loss of each row (B,) of ||p - y|| (`numerics.el2n`); 0 where it has none."""
    _, logits, wanted = _predict(model, batch, kind)
    counts = wanted.sum(dim=1)
    norms = error_norms(logits, _read_labels(batch, kind)[wanted])
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return norms.new_zeros(len(counts)).index_add(0, rows, norms) / counts.clamp(min=1)


def _read_labels(batch: Batch, kind: ModelKind) -> Tensor:
    """Labels in the place of the logits that predict them: a decoder predicts the next token."""
    return batch.labels[:, 1:] if kind == "causal" else batch.labels


def _predict(model: Any, batch: Batch, kind: ModelKind) -> tuple[Any, Tensor, Tensor]:
    """The model's outputs, its logits (tokens with loss, vocabulary), and the mask (B, L) of these tokens."""
    inputs = inputs_of(model, batch, kind)
    labels = _read_labels(batch, kind)
    wanted = labels != IGNORED
    if kind == "causal" and "logits_to_keep" in inspect.signature(model.forward).parameters:
        columns = wanted.any(dim=0).nonzero().flatten()
        outputs = model(**inputs, logits_to_keep=columns)
        return outputs, outputs.logits[wanted[:, columns]], wanted
    outputs = model(**inputs)
    if kind == "classifier":
        return outputs, outputs.logits[:, None][wanted], wanted
    logits = outputs.logits[:, :-1] if kind == "causal" else outputs.logits
    return outputs, logits[wanted], wanted


def logits_of(model: Any, batch: Batch, kind: ModelKind) -> Tensor:
    """All logits (B, L, vocabulary), or (B, classes), of a batch that is on the model's device."""
    return torch.as_tensor(model(**inputs_of(model, batch, kind)).logits)


def inputs_of(model: Any, batch: Batch, kind: ModelKind) -> dict[str, Any]:
    """What a model reads of a batch, by the names of its arguments."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if reads_mask(model):
        inputs["attention_mask"] = batch.attention_mask
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:  # a cache would be met again when blocks are recomputed
        inputs["use_cache"] = False
    if batch.token_types is not None and "token_type_ids" in accepted:
        inputs["token_type_ids"] = batch.token_types
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = decoder_inputs(model, batch.labels)
    return inputs


def masked_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """`inputs_of` a causal model with the mask: while a graph is recorded transformers looks at no values, and makes one."""
    return inputs_of(model, batch, "causal") | {"attention_mask": batch.attention_mask}


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What a decoder reads to predict `labels` (B, L): these, moved to the right behind its start.

    The model's own way, where it has one that works with its configuration.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        try:
            found: Tensor = own(labels=labels)
            return found
        except (AttributeError, ValueError, AssertionError, TypeError):  # a start token that the configuration lacks
            pass
    config = model.config
    known = (getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    start = next((token for token in known if token is not None), 0)
    pad = getattr(config, "pad_token_id", None)
    moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return moved.masked_fill(moved == IGNORED, 0 if pad is None else pad)


def _auxiliary(model: Any, outputs: Any) -> Tensor | None:
    auxiliary = getattr(outputs, "aux_loss", None)
    if not isinstance(auxiliary, torch.Tensor):
        return None
    places = (model, model.config, model.config.get_text_config())
    known = (getattr(place, name, None) for place in places for name in _COEFFICIENTS)
    weight = next((found for found in known if found is not None), 0.0)
    return auxiliary * weight if weight else None
