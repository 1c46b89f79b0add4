"""Models whose positions turn by the longest row of a forward pass, beyond a length: rows must not depend on their neighbours.

transformers takes one set of frequencies up to `original_max_position_embeddings` and another beyond it (longrope: Phi-3 with
128k), or makes them anew for the longest row so far (dynamic).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from sculptor.errors import DataError

_KINDS = ("longrope", "dynamic")


def guard_positions(model: nn.Module) -> None:
    """Has a model refuse rows whose results would depend on others in the same forward pass, or on what was read before."""
    limits = dict(_limits(model))
    if limits:
        model._sculptor_cache_works = False  # type: ignore[assignment]  # keys of a cache were turned by what there was then
        model._sculptor_turns_at = min(limits.values())  # type: ignore[assignment]
        model.register_forward_pre_hook(partial(_check, limits), with_kwargs=True)


def turns_at(model: Any) -> int | None:
    """The length up to which no row's positions depend on others; None where they never do."""
    found: int | None = getattr(model, "_sculptor_turns_at", None)
    return found


def _limits(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Kind of frequencies -> the length up to which they are the same for all rows."""
    for module in model.modules():
        kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        for layer, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
            if kind not in _KINDS:
                continue
            told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
            told = told.get(layer, told) if layer is not None else told
            limit = told.get("original_max_position_embeddings") if kind == "longrope" else None
            limit = limit or (getattr(config, "original_max_position_embeddings", None) if kind == "longrope" else None)
            limit = limit or getattr(module, "original_max_seq_len", None)
            if isinstance(limit, int):
                yield kind, limit


def _check(limits: Mapping[str, int], model: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    mask, ids = named.get("attention_mask"), named.get("input_ids", args[0] if args else named.get("inputs_embeds"))
    masked = isinstance(mask, Tensor) and mask.ndim == 2
    rows = mask if masked else ids
    if not isinstance(rows, Tensor) or rows.ndim < 2:
        return
    for kind, limit in limits.items():
        if rows.shape[1] <= limit:  # asked first: of lengths a GPU has to be waited for
            continue
        shortest = int(rows.sum(1).min()) if masked else rows.shape[1]
        if kind == "dynamic":
            raise DataError(
                f"a row of more than {limit} tokens: from there on this model turns positions by the longest row that it has read "
                f"({kind}), so that results would depend on the others; give --max-length {limit}"
            )
        if shortest <= limit:
            raise DataError(
                f"rows of {shortest} and of more than {limit} tokens in a forward pass: this model turns positions by the longest "
                f"({kind}), so that results would depend on the batch; give --max-length {limit}, or one row a pass "
                "(--batch-size 1, of train --micro-batch-size 1)"
            )
