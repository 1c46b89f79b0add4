"""Loss per token over examples, without gradients."""

from collections.abc import Sequence

import torch

from sculptor.data.examples import Example
from sculptor.model.load import LoadedModel
from sculptor.model.loss import batch_loss, predictions
from sculptor.progress import Bar
from sculptor.world import ALONE, World

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
