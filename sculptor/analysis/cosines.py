"""How alike a matrix's input and output are: what the paper takes for importance (`methods/ranks.py`)."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.checkpoint.architecture import Architecture, Target
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.chat import check_use, tell_unread
from sculptor.data.examples import Example, encode_sources, resolve_max_length
from sculptor.data.labelled import classes_of
from sculptor.data.rows import Data, Notice, read_sources
from sculptor.methods.ranks import normalize_importance
from sculptor.methods.settings import AnalyzeSettings
from sculptor.model.load import LoadedModel, load_model, load_tokenizer
from sculptor.model.loss import batch_loss
from sculptor.progress import Bar, Progress

# Importance is a mean over tokens: a few hundred rows settle it, more only cost time.
_MAX_ROWS = 256


def read_examples(
    checkpoint: Checkpoint, architecture: Architecture, settings: AnalyzeSettings, data: Data, notice: Notice
) -> tuple[Example, ...]:
    """A few rows, spread evenly over the data, or in the shares that their weights give them."""
    max_length = resolve_max_length(settings.max_length, architecture.max_positions)
    tokenizer = load_tokenizer(checkpoint, architecture, settings.chat_template)
    sources = read_sources(data, settings.max_rows, settings.columns, notice, classes=classes_of(architecture))
    check_use([row for source in sources for row in source.rows], settings.chat_template)
    encoded = encode_sources(sources, tokenizer, architecture.kind, max_length, architecture.vocab_size)
    for source in sources:
        tell_unread(source.name, source.rows, tokenizer, notice)
    found = encoded.of_an_epoch(settings.seed)
    return found[:: max(1, -(-len(found) // _MAX_ROWS))]


def measure_importance(
    checkpoint: Checkpoint,
    architecture: Architecture,
    targets: Sequence[Target],
    examples: Sequence[Example],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    """Cosines over their mean, by matrix; none without examples."""
    if not examples:
        return {}
    loaded = load_model(checkpoint, device, architecture)
    with closing(progress(total=len(examples), desc="importance", unit="row")) as bar:
        cosines = measure_cosines(loaded, targets, examples, seed, bar)
    return normalize_importance(cosines)


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
        if target.window.is_whole and target.shape[0] == target.shape[1]:
            module = model.get_submodule(target.module)
            handles.append(module.register_forward_hook(record([target.name]), with_kwargs=True))
        else:
            by_block[target.block].append(target.name)
    for block, names in by_block.items():
        handles.append(model.get_submodule(block).register_forward_hook(record(names), with_kwargs=True))
    try:
        for example in examples:
            batch_loss(model, loaded.batch([example], seed).to(loaded.device), loaded.kind)
            bar.update(1)
    finally:
        for handle in handles:
            handle.remove()
    return {target.name: sums[target.name] / max(1, counts[target.name]) for target in targets}


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """Per-token cosine of (..., d) tensors, flattened, float64."""
    x64, y64 = (t.detach().reshape(-1, t.shape[-1]).to(torch.float64) for t in (x, y))
    return nn.functional.cosine_similarity(x64, y64, dim=1)
