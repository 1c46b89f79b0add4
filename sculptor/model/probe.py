"""A model tried out once, before anything is believed of its loss."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.architecture import Architecture, build_skeleton
from sculptor.checkpoint.configuration import reason_of
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED
from sculptor.errors import CheckpointError, SculptorError
from sculptor.model.loss import batch_loss, inputs_of, logits_of
from sculptor.model.masks import note_mask

_LENGTH, _CHANGED = 8, 3
# Of the change at the changed tokens themselves, what rounding may make of earlier ones.
_SHARE = 1e-2
# Of the logits' spread, what computing in another shape may move.
_NOISE = {torch.float32: 1e-3, torch.float64: 1e-6}
_NOISE_OTHERS = 0.2


@torch.no_grad()
def check_model(
    checkpoint: Checkpoint, architecture: Architecture, model: Any, device: torch.device, *, mixed: bool = False
) -> None:
    """Checks that a model runs on text alone, that padding does not move its predictions, and later tokens no earlier ones.

    Args:
        checkpoint: that it was loaded from.
        architecture: of the checkpoint.
        model: loaded.
        device: where it computes.
        mixed: some of its parameters are bfloat16, for training under autocast.

    Raises:
        CheckpointError: if they do: its loss would mean nothing, or depend on the batch.
    """
    size = max(2, min(97, architecture.vocab_size - 1))
    ids = torch.tensor([[1 + (7 * i) % size for i in range(_LENGTH)]] * 3, device=device)
    ids[1, -_CHANGED:] = 1 + (ids[1, -_CHANGED:] + 2) % size
    mask = torch.ones_like(ids)
    mask[2, -_CHANGED:] = 0
    name, kind = architecture.model_class, architecture.kind
    if kind == "classifier":
        _check_classifier(checkpoint, name, model, ids[2:], mixed)
        return
    try:
        labels = ids.masked_fill(mask == 0, IGNORED)  # some decoders begin with the last of them
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits = logits_of(model, Batch(ids, mask, labels), kind).float()
            alone = logits_of(
                model, Batch(ids[2:, :-_CHANGED], mask[2:, :-_CHANGED], ids[2:, :-_CHANGED]), kind
            ).float()
    except SculptorError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as cause:  # models ask for images, languages, ...
        raise _needs_more(checkpoint, name, cause) from cause
    scale = float(alone.std())
    apart = logits[2:, :-_CHANGED] - alone
    moved = float(apart.abs().max())
    dtype = torch.bfloat16 if mixed else computing_dtype(model)
    # Another shape rounds otherwise, the largest of all logits in bfloat16 once by 0.4 of a tuned model's spread.
    if dtype not in _NOISE:
        found = float(apart.square().mean().sqrt())
        if kind == "causal":  # the row beside it, of the same shape, tells what padding does where little is moved
            found = max(found, float((logits[2] - logits[0])[:-_CHANGED].abs().max()))
        moved = min(moved, found)
    if moved > _NOISE.get(dtype, _NOISE_OTHERS) * scale:
        raise CheckpointError(
            f"{checkpoint.path}: padding moves what {name} predicts, by {moved / scale:.0e} of its spread; its loss would depend "
            "on the batch"
        )
    if kind != "causal":
        return
    difference = (logits[0] - logits[1]).abs().amax(dim=-1)
    early, late = float(difference[:-_CHANGED].max()), float(difference[-_CHANGED:].max())
    if early > (_SHARE if dtype in _NOISE else _NOISE_OTHERS) * late:
        raise CheckpointError(
            f"{checkpoint.path}: {name} is no causal model as it is configured: a later token moves an earlier prediction; set "
            '"is_decoder": true in config.json, or name the class for masked language modelling in "architectures"'
        )
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        inputs = inputs_of(model, Batch(ids, mask, labels), kind)
        note_mask(model, inputs, mask, logits, _NOISE.get(dtype, _NOISE_OTHERS) * scale)


def _check_classifier(checkpoint: Checkpoint, name: str, model: Any, ids: Tensor, mixed: bool) -> None:
    """Checks that a classifier says the same of a short sequence beside a longer one."""
    short, pad = ids[:, :-_CHANGED], model.config.pad_token_id
    padded = torch.cat([ids, ids])
    padded[1, -_CHANGED:] = 0 if pad is None else pad
    mask = torch.ones_like(padded)
    mask[1, -_CHANGED:] = 0
    try:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
            together = logits_of(model, Batch(padded, mask, padded), "classifier").float()
            alone = logits_of(model, Batch(short, torch.ones_like(short), short), "classifier").float()
    except torch.OutOfMemoryError:
        raise
    except Exception as cause:
        if pad is None:
            raise CheckpointError(
                f'{checkpoint.path}: config.json has no "pad_token_id", by which {name} finds the end of a sequence in a batch; '
                "set it to that of the tokenizer"
            ) from cause
        raise _needs_more(checkpoint, name, cause) from cause
    moved = float((together[1:] - alone).abs().max())
    dtype = torch.bfloat16 if mixed else computing_dtype(model)
    if moved > _NOISE.get(dtype, _NOISE_OTHERS) * max(float(alone.abs().max()), 1e-3):
        raise CheckpointError(
            f"{checkpoint.path}: padding moves what {name} predicts, by {moved:.0e}; its loss would depend on the batch"
        )


@torch.no_grad()
def tell_own_terms(
    architecture: Architecture, model: Any, device: torch.device, notice: Callable[[str], object] = lambda _: None
) -> None:
    """Tells, in one line, of a model whose own loss has terms that training leaves out, on a few tokens.

    Args:
        architecture: of its checkpoint.
        model: loaded.
        device: where it computes.
        notice: told.
    """
    if architecture.kind == "classifier" or "labels" not in inspect.signature(model.forward).parameters:
        return
    size = max(2, min(97, architecture.vocab_size - 1))
    ids = torch.tensor([[1 + (7 * i) % size for i in range(_LENGTH)]] * 2, device=device)
    batch = Batch(ids, torch.ones_like(ids), ids)
    inputs = inputs_of(model, batch, architecture.kind)
    inputs.pop("decoder_input_ids", None)  # which it makes of the labels
    shifted = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
    try:
        # Some decoders want their labels where they are predicted.
        said = [ids, *([shifted] if architecture.kind == "causal" else [])]
        owns = [float(model(**inputs, labels=labels).loss) for labels in said]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it wants more to know its loss: there is nothing to compare with
        return
    found = batch_loss(model, batch, architecture.kind)
    ours = float(found.total) / found.num_tokens + float(found.auxiliary if found.auxiliary is not None else 0.0)
    if all(abs(own - ours) > 0.02 * max(1.0, abs(ours)) for own in owns):
        notice(
            f"{architecture.model_class}'s own loss is {owns[0]:.3f} on a few tokens where cross-entropy"
            f"{' and its routers' if found.auxiliary is not None else ''} come to {ours:.3f}: its other terms are not trained"
        )


@torch.no_grad()
def check_text_alone(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Checks without weights what `check_model` checks first with them: that a model runs on text alone.

    Raises:
        CheckpointError: if it does not.
    """
    skeleton = build_skeleton(checkpoint)
    ids = torch.zeros(1, _LENGTH, dtype=torch.long, device="meta")
    try:
        logits_of(skeleton, Batch(ids, torch.ones_like(ids), ids), architecture.kind)
    except (AttributeError, TypeError, ValueError) as cause:
        raise _needs_more(checkpoint, architecture.model_class, cause) from cause
    except Exception:  # looks at values, which are not there: this says nothing
        return


def _needs_more(checkpoint: Checkpoint, name: str, cause: Exception) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path}: {name} does not run on text alone ({reason_of(cause)})")


def computing_dtype(model: Any) -> torch.dtype:
    """What a model computes in."""
    found: torch.dtype = next(model.parameters()).dtype
    return found
