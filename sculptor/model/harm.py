"""Harm: KL(base || new) in nats a token on the base's own samples, from what is kept of the base's predictions.

Sequences are independent, tokens of one are not, so its standard error is that of a ratio of sums (`sculptor.numerics.ratio`).
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
        num_samples: sequences, with `num_tokens` predictions.
    """

    __pydantic_config__ = STRICT

    nats: Finite
    error: NotNegative
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


def harm_of(sums: Sequence[float], counts: Sequence[int]) -> Harm:
    """From the sum and the number of tokens of every sample.

    Raises:
        ValueError: if there are fewer than two samples, or no tokens.
    """
    if len(sums) < 2 or not sum(counts):
        raise ValueError(f"{len(sums)} samples of {sum(counts)} tokens: expected at least two")
    mean, error = ratio_of_sums(sums, counts)
    return Harm(mean, error, len(sums), sum(counts))


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
    sums = [0.0] * len(samples)
    for group in world.share(groups):
        chosen = [samples[i] for i in group]
        found = sample_losses(model, chosen, device, pad_id) if losses is None else losses(chosen)
        for i, loss in zip(group, found.tolist(), strict=True):
            sums[i] = loss
    return harm_of(world.total(*sums), [len(sample.base.ids) for sample in samples])


def _rows(model: Any, length: int, device: torch.device) -> int:
    """Of a pass: on a GPU a pass of few rows takes as long as one of many, whose logits fit."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(ROWS, _LOGITS.get(device.type, 0) // (length * vocabulary))


def sample_losses(model: Any, samples: Sequence[Sample], device: torch.device, pad_id: int = 0) -> Tensor:
    """The sum of KL(base || new) over each sample's tokens (rows,), float64; carries the graph where there is one."""
    batch = collate([sample.example for sample in samples], pad_id).to(device)
    found = estimated_divergence(joined(samples, device), predictions(model, batch, "causal")).double()
    return torch.stack([part.sum() for part in torch.split(found, [len(each.base.ids) for each in samples])])
