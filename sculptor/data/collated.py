"""Rows of another program's loader, as its collator hands them to the model, to token sequences."""

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from sculptor.data.examples import IGNORED, Example
from sculptor.errors import DataError

_REMEDY = "give the callback data=, rows as `sculptor train` takes them, or carry='keep'"


def collated_examples(loader: Any, count: int) -> tuple[Example, ...]:
    """About `count` rows of a loader's data set, evenly over it; nothing is drawn from the loader itself.

    A packed row becomes the sequences in it; of a row of preferences it is the chosen answer.

    Args:
        loader: a DataLoader.
        count: rows, at most.

    Raises:
        DataError: if they are not what a causal model reads.
    """
    rows = getattr(loader, "dataset", None)
    if rows is None or not isinstance(rows, Sized) or not hasattr(rows, "__getitem__"):
        raise DataError(f"the trainer's rows come one after another and cannot be measured; {_REMEDY}")
    found: list[Example] = []
    count = min(len(rows), count)
    for i in range(count):
        row = rows[(2 * i + 1) * len(rows) // (2 * count)]
        found += batch_examples(loader.collate_fn([row]))
    if not found:
        raise DataError(f"no token of the trainer's rows carries loss; {_REMEDY}")
    return tuple(found)


def batch_examples(batch: Any) -> list[Example]:
    """The sequences of the first row of a batch.

    Raises:
        DataError: if it has no tokens, or does not say which of them carry loss.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise DataError(f"the trainer's rows have no input_ids before a step (a policy writes them?); {_REMEDY}")
    ids = ids[0]
    labels = _labels(batch, ids)
    mask, positions = (_row(batch, name) for name in ("attention_mask", "position_ids"))
    read = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    starts = [0] if positions is None or mask is not None else (positions == 0).nonzero().flatten().tolist()
    examples = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        kept = read[start:stop]
        one = Example(tuple(ids[start:stop][kept].tolist()), tuple(labels[start:stop][kept].tolist()))
        if any(label != IGNORED for label in one.labels[1:]):
            examples.append(one)
    return examples


def _row(batch: Any, name: str) -> Tensor | None:
    found = batch.get(name)
    return found[0] if isinstance(found, Tensor) and found.ndim == 2 else None


def _labels(batch: Any, ids: Tensor) -> Tensor:
    labels, mask = _row(batch, "labels"), _row(batch, "completion_mask")
    if labels is None and mask is not None:
        labels = torch.where(mask.bool(), ids, torch.full_like(ids, IGNORED))
    if labels is None:
        raise DataError(f"the trainer's rows have neither labels nor completion_mask; {_REMEDY}")
    if bool(((labels != IGNORED) & (labels != ids)).any()):
        raise DataError(f"labels of the trainer's rows are not the tokens themselves; {_REMEDY}")
    return labels
