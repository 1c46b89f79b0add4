"""JSON files that every program reads alike."""

import json
from pathlib import Path
from typing import Any

from sculptor.errors import CheckpointError
from sculptor.validation import each_key_once, read_file


def bytes_of(path: Path) -> bytes:
    return read_file(path, CheckpointError, "restore it")


def read_plain(content: bytes) -> Any:
    """JSON that every program reads alike: UTF-8 without a mark, no key twice.

    Raises:
        ValueError: if it is not.
    """
    return json.loads(content.decode("utf-8"), object_pairs_hook=each_key_once)


def is_plain(path: Path) -> bool:
    try:
        read_plain(bytes_of(path))
    except (ValueError, RecursionError):
        return False
    return True
