"""How many directions of each matrix are protected: the paper's adaptive rank.

    r = mrr + I (trr - mrr),  k = floor(r min(m, n))

I is a matrix's mean cosine similarity between input and output, divided by the mean over all matrices. Where the
text of arXiv 2504.07097 leaves it open: if in and out differ in size, the cosine is that of the residual stream
into and out of the block; I below 0 gives mrr; without data I is 1 everywhere; one direction always stays free.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.checkpoint.architecture import Target
from sculptor.data.batches import prepare
from sculptor.data.examples import Example
from sculptor.model.load import LoadedModel
from sculptor.model.loss import batch_loss
from sculptor.progress import Bar


def normalize_importance(cosines: Mapping[str, float]) -> dict[str, float]:
    """Divides by the mean, so that importance is 1 on average; a mean of 0 or less gives 1 everywhere."""
    mean = sum(cosines.values()) / len(cosines)
    return {name: value / mean if mean > 0 else 1.0 for name, value in cosines.items()}


def adaptive_retention(importance: float, minimum: float, target: float) -> float:
    """The paper's r; importance below 0 gives `minimum`."""
    return minimum + max(0.0, importance) * (target - minimum)


def protected_count(retention: float, shape: tuple[int, int]) -> int:
    """k = floor(r min(m, n)), at most all but one.

    A product within 1e-9 below a whole number counts as it: 0.29 of 100 is 29, not 28.
    """
    d = min(shape)
    return max(0, min(d - 1, math.floor(retention * d + 1e-9)))


@torch.no_grad()
def measure_cosines(
    loaded: LoadedModel, targets: Sequence[Target], examples: Sequence[Example], seed: int, bar: Bar
) -> dict[str, float]:
    """Mean cosine of every matrix's input and output over the tokens of some examples.

    One example at a time, so there is no padding to leave out.

    Returns:
        Per target name a number in [-1, 1].
    """
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)

    def record(names: Sequence[str]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
            y = output[0] if isinstance(output, tuple) else output
            cosines = _cosines(x, y)
            for name in names:
                sums[name] += float(cosines.sum())
                counts[name] += cosines.numel()

        return hook

    model = loaded.model
    by_block: dict[str, list[str]] = defaultdict(list)
    handles = []
    for target in targets:
        if target.shape[0] == target.shape[1]:
            module = model.get_submodule(target.module)
            handles.append(module.register_forward_hook(record([target.name]), with_kwargs=True))
        else:
            by_block[target.block].append(target.name)
    for block, names in by_block.items():
        handles.append(model.get_submodule(block).register_forward_hook(record(names), with_kwargs=True))
    try:
        tokenizer = loaded.tokenizer
        for i, example in enumerate(examples):
            batch = prepare([example], loaded.kind, loaded.pad_id, tokenizer.mask_token_id, len(tokenizer), seed + i)
            batch_loss(model, batch.to(loaded.device), loaded.kind)
            bar.update(1)
    finally:
        for handle in handles:
            handle.remove()
    return {target.name: sums[target.name] / max(1, counts[target.name]) for target in targets}


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Per-token cosine of (..., d) tensors, flattened, float64."""
    x64, y64 = (t.detach().reshape(-1, t.shape[-1]).to(torch.float64) for t in (x, y))
    return nn.functional.cosine_similarity(x64, y64, dim=1)
