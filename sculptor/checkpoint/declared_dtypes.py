"""Where a checkpoint's files say in which dtype it is loaded: configurations, those in them, and an index."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sculptor.checkpoint.directory import INDEX_NAME
from sculptor.checkpoint.reader import Checkpoint

DTYPE_KEYS = ("dtype", "torch_dtype")


def inner_dtypes(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str | None]]:
    """Of configurations in a configuration, which some classes load by: where, and the dtype."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("config"):
            for name in DTYPE_KEYS:
                if value.get(name) is not None:
                    yield f"{place}{key}.{name}", named_dtype(value, (name,))
            yield from inner_dtypes(value, f"{place}{key}.")


def index_dtype(checkpoint: Checkpoint) -> str | None:
    """What an index says, and transformers loads by where the configuration does not say."""
    try:
        return named_dtype(json.loads((checkpoint.path / INDEX_NAME).read_bytes()).get("metadata") or {}, ("dtype",))
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def named_dtype(config: Mapping[str, Any], keys: Sequence[str] = DTYPE_KEYS) -> str | None:
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if found is None or isinstance(found, str):
        return found and found.removeprefix("torch.")
    return json.dumps(found)  # one for each part of a model
