"""What a row is routed by: the model's own hidden states, averaged over what it is asked, halfway up and at the top."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sculptor.data.batches import collate
from sculptor.data.examples import IGNORED, Example, encode_row
from sculptor.data.rows import Row
from sculptor.errors import DataError
from sculptor.model.load import LoadedModel
from sculptor.progress import Bar


@torch.no_grad()
def queries(loaded: LoadedModel, rows: Sequence[Row], max_length: int, batch_size: int, bar: Bar) -> Tensor:
    """(rows, 2, d), float32, on the CPU; of prompts and answers the prompt, of text its first window.

    Args:
        loaded: a decoder.
        rows: of any kind.
        max_length: longest sequence in tokens.
        batch_size: rows per forward; what a row gives does not depend on the others.
        bar: advanced by the rows.

    Raises:
        DataError: if a row does not fit.
    """
    asked = [_asked(loaded, row, max_length) for row in rows]
    found: dict[int, Tensor] = {}
    order = sorted(range(len(asked)), key=lambda i: -asked[i].length)
    loaded.model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([asked[i] for i in chosen], loaded.pad_id).to(loaded.device)
        states = loaded.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
        weights = batch.attention_mask.float() / batch.attention_mask.sum(dim=1, keepdim=True)
        means = [torch.einsum("bl,bld->bd", weights, state.float()) for state in (states[len(states) // 2], states[-1])]
        found |= zip(chosen, torch.stack(means, dim=1).cpu(), strict=True)
        bar.update(len(chosen))
    return torch.stack([found[i] for i in range(len(asked))])


def _asked(loaded: LoadedModel, row: Row, max_length: int) -> Example:
    """The tokens before the first that is learned; all, where there are none."""
    made = encode_row(row, loaded.tokenizer, loaded.kind, max_length, loaded.architecture.vocab_size)
    if not made.examples:
        raise DataError(f"{row.where}: does not fit into {max_length} tokens; raise --max-length")
    ids, labels = made.examples[0].input_ids, made.examples[0].labels
    first = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
    kept = ids[:first] if first else ids
    return Example(kept, (IGNORED,) * len(kept))
