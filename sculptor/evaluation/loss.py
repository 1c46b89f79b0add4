"""Loss per token over examples, without gradients."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from sculptor.data.examples import IGNORED, Example
from sculptor.model.load import LoadedModel
from sculptor.model.loss import batch_loss, predictions
from sculptor.progress import Bar
from sculptor.world import ALONE, World

_LOGITS = 2**27  # elements that exist at a time where each sequence has a loss of its own
_MASKING_SEED = 0  # evaluations of a masked model mask the same tokens every time


@torch.no_grad()
def mean_loss(
    loaded: LoadedModel, examples: Sequence[Example], batch_size: int, bar: Bar | None = None, world: World = ALONE
) -> tuple[float, int]:
    """Mean cross-entropy in nats per token, and the number of tokens; the model is left in evaluation mode.

    Several processes divide the examples, and all get the mean over them.
    """
    loaded.model.eval()
    order = world.share(sorted(range(len(examples)), key=lambda i: -examples[i].length))
    total = tokens = 0.0
    passes = world.most(-(-len(order) // batch_size))
    for start in range(0, passes * batch_size, batch_size):
        if start >= len(order):  # rows of other processes, which have more
            loaded.pass_by()
            continue
        chosen = [examples[i] for i in order[start : start + batch_size]]
        batch = loaded.batch(chosen, _MASKING_SEED)
        found = batch_loss(loaded.model, batch.to(loaded.device), loaded.kind)
        total += float(found.total)
        tokens += found.num_tokens
        if bar is not None:
            bar.update(len(chosen))
    total, tokens = world.total(total, tokens)
    return total / tokens, int(tokens)


@torch.no_grad()
def classify(
    loaded: LoadedModel, examples: Sequence[Example], batch_size: int, bar: Bar, world: World = ALONE
) -> tuple[float, float]:
    """Of a classifier, mean cross-entropy in nats per row and the share of rows whose class has the largest logit."""
    loaded.model.eval()
    order = world.share(sorted(range(len(examples)), key=lambda i: -examples[i].length))
    total = right = 0.0
    for start in range(0, world.most(-(-len(order) // batch_size)) * batch_size, batch_size):
        if start >= len(order):  # rows of other processes, which have more
            loaded.pass_by()
            continue
        chosen = [examples[i] for i in order[start : start + batch_size]]
        batch = loaded.batch(chosen, _MASKING_SEED).to(loaded.device)
        logits, labels = predictions(loaded.model, batch, loaded.kind).float(), batch.labels[:, 0]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += float((logits.argmax(dim=1) == labels).sum())
        bar.update(len(chosen))
    total, right, count = world.total(total, right, len(order))
    return total / count, right / count


@torch.no_grad()
def each_loss(
    loaded: LoadedModel, examples: Sequence[Example], batch_size: int, bar: Bar | None = None
) -> list[tuple[float, int]]:
    """Summed cross-entropy of every sequence of a causal model, in nats, and over how many tokens."""
    loaded.model.eval()
    order = sorted(range(len(examples)), key=lambda i: -examples[i].length)
    found: dict[int, tuple[float, int]] = {}
    while len(found) < len(order):
        at = len(found)
        rows = _LOGITS // (examples[order[at]].length * loaded.architecture.vocab_size)
        chosen = order[at : at + max(1, min(batch_size, rows))]
        batch = loaded.batch([examples[i] for i in chosen], _MASKING_SEED).to(loaded.device)
        counts = [sum(label != IGNORED for label in examples[i].labels[1:]) for i in chosen]
        labels = batch.labels[:, 1:]
        losses = cross_entropy(
            predictions(loaded.model, batch, "causal").float(), labels[labels != IGNORED], reduction="none"
        )
        for i, part, count in zip(chosen, torch.split(losses.double(), counts), counts, strict=True):
            found[i] = float(part.sum()), count
        if bar is not None:
            bar.update(len(chosen))
    return [found[i] for i in range(len(examples))]
