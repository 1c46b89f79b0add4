"""Results as JSON: dataclasses as objects, with the properties that are part of a result."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def to_json(result: object, **extra: Any) -> str:
    """A dataclass as a JSON object; numbers that JSON does not have become null."""
    return _dumps(_object(result) | extra)


def list_to_json(results: Sequence[object]) -> str:
    """Dataclasses as a JSON list of such objects."""
    return _dumps([_object(result) for result in results])


def _object(result: object) -> dict[str, Any]:
    assert dataclasses.is_dataclass(result)
    assert not isinstance(result, type)
    return dataclasses.asdict(result)


def _dumps(value: Any) -> str:
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
