"""A large batch through one block in parts, so that only a part's activations exist at a time.

Blocks treat rows of a batch alike, so a block of a part is the part of a block. Which arguments belong to rows is told by
their first size. Whether that is right is tried once for each kind of call: which block, and which arguments are split.
Norms treat every token for itself and are split untried.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.modes import evaluating

Call = tuple[tuple[Any, ...], dict[str, Any]]


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int) -> list[Call] | None:
    """The calls of a block with at most so many tokens each, or one row if that is longer; None if one call will do.

    Args:
        args: the first is (B, T, h).
        kwargs: of the same call.
        tokens: of a part.
    """
    if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
        return None
    rows, length, _ = args[0].shape
    count = -(-rows // max(1, tokens // max(1, length)))
    if count < 2:
        return None
    size = -(-rows // count)
    sizes = [min(size, rows - start) for start in range(0, rows, size)]
    return list(zip(_split(args, sizes), _split(kwargs, sizes), strict=True))


def split_paths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Which of the arguments `split_call` splits."""
    return tuple(_paths((args, kwargs), args[0].shape[0]))


def _paths(value: Any, rows: int, path: str = "") -> Iterator[str]:
    if _has_rows(value, rows):
        yield path
    elif isinstance(value, dict | tuple | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(item, rows, f"{path}/{key}")


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == rows


def _split(value: Any, sizes: Sequence[int]) -> Sequence[Any]:
    """A value for each part; what does not belong to rows is the same for all."""
    if _has_rows(value, sum(sizes)):
        return torch.split(value, list(sizes))
    if isinstance(value, dict):
        parts = {key: _split(item, sizes) for key, item in value.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(len(sizes))]
    if isinstance(value, tuple | list):
        items = [_split(item, sizes) for item in value]
        return [type(value)(item[i] for item in items) for i in range(len(sizes))]
    return [value] * len(sizes)


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module normalizes each token for itself, and does nothing else."""
    named = isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and not any(True for _ in module.children())


def join(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What one call would have returned, given the rows of each part."""
    first = outputs[0]
    if isinstance(first, Tensor):
        by_row = all(found.ndim and found.shape[0] == size for found, size in zip(outputs, sizes, strict=True))
        return torch.cat(list(outputs)) if by_row else first
    if isinstance(first, tuple | list):
        return type(first)(join(items, sizes) for items in zip(*outputs, strict=True))
    return first


@torch.no_grad()
def parts_work(module: torch.nn.Module, forward: Callable[..., Any], whole: Call, parts: Sequence[Call]) -> bool:
    """Whether the first two parts of a batch give apart what they give together, dropout aside.

    Two tell what all would. A block that writes into its input is left whole.
    """
    both = sum(args[0].shape[0] for args, _ in parts[:2])
    args, kwargs = _split(whole, [both, whole[0][0].shape[0] - both])[0]
    hidden = args[0].clone()
    try:
        with evaluating(module):
            expected = _first(forward(hidden, *args[1:], **kwargs))
            if hidden._version:
                return False
            found = torch.cat([_first(forward(*args, **kwargs)) for args, kwargs in parts[:2]])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    scale = float(expected.abs().max()) or 1.0
    return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=0.02, atol=0.02 * scale))


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def without_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call without a cache of keys and values: some models always make one, and running a block again doubles it."""
    from transformers import Cache

    def kept(value: Any) -> Any:
        return None if isinstance(value, Cache) else value

    return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}
