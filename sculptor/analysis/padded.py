"""Calibration rows in batches, and which of their tokens are padding."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED, Example
from sculptor.model.load import LoadedModel

# Tokens of one forward: as many as this leaves room for, within bounds.
_ACTIVATION_BYTES = {"cuda": 2e9, "cpu": 5e8}
_BATCH_TOKENS = (256, 8192)
# Of a GPU's memory: what all of it is stays the same from run to run, and how rows are put together with it.
_ACTIVATION_SHARE = 1 / 16


def activation_bytes(device: torch.device, device_memory: float | None = None) -> float:
    """What the activations of one forward may take: more on a large GPU, where small batches wait for their launches.

    Args:
        device: where the model is.
        device_memory: GB to stay within, if anybody says so.
    """
    least = _ACTIVATION_BYTES[device.type]
    if device.type != "cuda" or device_memory is not None:
        return least
    return max(least, _ACTIVATION_SHARE * torch.cuda.get_device_properties(device).total_memory)


def make_batches(
    loaded: LoadedModel, examples: Sequence[Example], seed: int, device_memory: float | None = None
) -> Iterator[Batch]:
    """Examples of similar length together, as many as activations leave room for; longest first."""
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    room = _batch_tokens(loaded, activation_bytes(loaded.device, device_memory))
    start = 0
    while start < len(order):
        size = max(1, room // max(1, examples[order[start]].length))
        chosen = [examples[i] for i in order[start : start + size]]
        batch = loaded.batch(chosen, seed)
        if loaded.kind == "seq2seq" and batch.labels.shape == batch.input_ids.shape:
            # Encoder and decoder states are told apart by their length.
            batch = Batch(batch.input_ids, batch.attention_mask, nn.functional.pad(batch.labels, (0, 1), value=IGNORED))
        yield batch.to(loaded.device)
        start += size


def _batch_tokens(loaded: LoadedModel, activations: float) -> int:
    """Tokens whose activations fit: block boundaries, the inside of one block twice, logits and their gradient."""
    widths: dict[str, float] = defaultdict(float)
    for target in loaded.architecture.targets:
        widths[target.block] += target.width
    size = 2 if loaded.device.type == "cuda" else 4
    hidden = loaded.model.get_input_embeddings().weight.shape[1]
    per_token = size * (hidden * len(widths) + 2 * max(widths.values())) + 12 * loaded.architecture.vocab_size
    return int(min(max(activations / per_token, _BATCH_TOKENS[0]), _BATCH_TOKENS[1]))


@dataclass(frozen=True, eq=False, slots=True)
class Mask:
    """Which tokens (B, T) are no padding, and how many."""

    real: Tensor
    count: int


def find_masks(batch: Batch, loaded: LoadedModel) -> list[Mask]:
    """Of a batch, for each shape a layer may see."""
    masks = [batch.attention_mask.bool()]
    if loaded.kind == "seq2seq":
        masks.append(batch.labels != IGNORED)
    return [Mask(mask, int(mask.sum())) for mask in masks]
