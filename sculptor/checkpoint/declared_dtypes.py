"""Dtypes that a checkpoint has, and those that its files say it is loaded in: configurations, those in them, and an index."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sculptor.checkpoint.directory import INDEX_NAME
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tensors import dtype_name

DTYPE_KEYS = ("dtype", "torch_dtype")


def is_inner(key: str, value: Any) -> bool:
    """Whether what a configuration has under a key is a configuration: `text_config`, the `encoder` of some pairs."""
    return isinstance(value, dict) and (key.endswith("config") or "model_type" in value)


def inner_dtypes(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str | None]]:
    """Of configurations in a configuration, which some classes load by: where, and the dtype, under the old name or the new."""
    for key, value in config.items():
        if is_inner(key, value):
            for name in DTYPE_KEYS:
                if value.get(name) is not None:
                    yield f"{place}{key}", named_dtype(value, (name,))
            yield from inner_dtypes(value, f"{place}{key}.")


def floating_dtypes(checkpoint: Checkpoint) -> set[str]:
    """Floating-point dtypes of its tensors."""
    return {dtype_name(info.dtype) for info in checkpoint.infos.values() if info.dtype.is_floating_point}


def index_dtype(checkpoint: Checkpoint) -> str | None:
    """What an index says, and transformers loads by where the configuration does not say."""
    try:
        return named_dtype(json.loads((checkpoint.path / INDEX_NAME).read_bytes()).get("metadata") or {}, ("dtype",))
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def named_dtype(config: Mapping[str, Any], keys: Sequence[str] = DTYPE_KEYS) -> str | None:
    """The dtype that a configuration names, by the first of some keys."""
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if found is None or isinstance(found, str):
        return found and found.removeprefix("torch.")
    return json.dumps(found)  # one for each part of a model
