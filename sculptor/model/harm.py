"""Harm: KL(base || new) in nats a token on the base's own samples, from what is kept of the base's predictions.

Sequences are independent, tokens of one are not, so its standard error is that of a ratio of sums (`sculptor.numerics.ratio`).
The first token of each is told apart: the mean over all tokens hides what becomes of how answers begin, which decides the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sculptor.data.batches import collate
from sculptor.model.loss import predictions
from sculptor.model.samples import ROWS, Sample, joined
from sculptor.numerics.divergence import estimated_divergence
from sculptor.numerics.ratio import ratio_of_sums
from sculptor.validation import STRICT, Count, Finite, Name, NotNegative
from sculptor.world import ALONE, World

_LOGITS = {"cuda": 2**27}  # elements of a pass


@dataclass(frozen=True, slots=True)
class Harm:
    """What was measured.

    Attributes:
        nats: KL(base || new) a token.
        error: its standard error, over samples.
        first: KL(base || new) at the first token of a sample, in a conversation of its answer; the mean over samples.
        first_error: its standard error.
        num_samples: sequences, with `num_tokens` predictions.
    """

    __pydantic_config__ = STRICT

    nats: Finite
    error: NotNegative
    first: Finite
    first_error: NotNegative
    num_samples: Count
    num_tokens: Count


@dataclass(frozen=True, slots=True)
class NamedHarm:
    """What became of one name.

    Attributes:
        name: of the protected text.
        harm: KL(base || new) on it.
        rise: of the loss on it, in nats a token; `rise_error` its standard error.
    """

    __pydantic_config__ = STRICT

    name: Name
    harm: Harm
    rise: Finite
    rise_error: NotNegative


def harm_of(sums: Sequence[Sequence[float]], counts: Sequence[int]) -> Harm:
    """From every sample's sum and its first token's part of that (`by_sample`), and its number of tokens.

    Raises:
        ValueError: if there are fewer than two samples, or no tokens.
    """
    if len(sums) < 2 or not sum(counts):
        raise ValueError(f"{len(sums)} samples of {sum(counts)} tokens: expected at least two")
    mean = ratio_of_sums([whole for whole, _ in sums], counts)
    first = ratio_of_sums([first for _, first in sums], [min(1, count) for count in counts])
    return Harm(mean.mean, mean.error, first.mean, first.error, len(sums), sum(counts))


@torch.no_grad()
def measure_harm(
    model: Any,
    samples: Sequence[Sample],
    device: torch.device,
    *,
    pad_id: int = 0,
    world: World = ALONE,
    losses: Callable[[Sequence[Sample]], Tensor] | None = None,
) -> Harm:
    """Harm of a causal model as it is; the model is left in evaluation mode.

    Args:
        model: a transformers model, protected or not, resident or streamed.
        samples: at least two.
        device: where its inputs go.
        pad_id: any id the model has.
        world: processes that divide the samples; all get the result.
        losses: what gives the losses of some samples, if not `sample_losses`.
    """
    model.eval()
    order = sorted(range(len(samples)), key=lambda i: -samples[i].example.length)
    rows = _rows(model, samples[order[0]].example.length, device)
    rows = min(rows, -(-len(order) // world.size)) if world.size > 1 else rows
    groups = [order[start : start + rows] for start in range(0, len(order), rows)]
    sums = [0.0] * (2 * len(samples))
    for group in world.share(groups):
        chosen = [samples[i] for i in group]
        found = sample_losses(model, chosen, device, pad_id) if losses is None else losses(chosen)
        for i, both in zip(group, found.tolist(), strict=True):
            sums[2 * i : 2 * i + 2] = both
    total = world.total(*sums)
    return harm_of(list(zip(total[::2], total[1::2], strict=True)), [len(sample.base.ids) for sample in samples])


def _rows(model: Any, length: int, device: torch.device) -> int:
    """Of a pass: on a GPU a pass of few rows takes as long as one of many, whose logits fit."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(ROWS, _LOGITS.get(device.type, 0) // (length * vocabulary))


def sample_losses(model: Any, samples: Sequence[Sample], device: torch.device, pad_id: int = 0) -> Tensor:
    """KL(base || new), summed over each sample's tokens and of its first alone (rows, 2), float64; carries the graph if any."""
    batch = collate([sample.example for sample in samples], pad_id).to(device)
    return by_sample(estimated_divergence(joined(samples, device), predictions(model, batch, "causal")), samples)


def by_sample(apart: Tensor, samples: Sequence[Sample]) -> Tensor:
    """What all tokens of some samples have, one after another: the sum of each sample and its first (rows, 2), float64."""
    parts = torch.split(apart.double(), [len(each.base.ids) for each in samples])
    return torch.stack([torch.stack((part.sum(), part[:1].sum())) for part in parts])
