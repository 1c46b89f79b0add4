"""`--columns prompt=question,completion=answer`: which columns of somebody's data are which of ours."""

import json
from collections.abc import Mapping
from typing import Any

from sculptor.errors import DataError, SettingsError
from sculptor.validation import each_key_once

# What a row can have for us; the first of each form is what tells it.
KNOWN = (
    "messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "system", "tools",
    "chat_template_kwargs", "choices", "gold", "references", "weight", "train", "text_pair", "label",
)  # fmt: skip
Columns = Mapping[str, str]


def parse_columns(given: str | Columns | None) -> dict[str, str]:
    """Our key -> their column.

    Raises:
        SettingsError: for an unknown key, or a pair that is none.
    """
    if given is None:
        return {}
    found: dict[str, str] = {}
    pairs = given.items() if isinstance(given, Mapping) else (_pair(part) for part in given.split(","))
    for ours, theirs in pairs:
        if ours not in KNOWN:
            raise SettingsError(f"--columns: unknown {ours!r}; known are {', '.join(KNOWN)}")
        if ours in found:
            raise SettingsError(f"--columns: {ours!r} twice")
        found[ours] = theirs
    return found


def _pair(part: str) -> tuple[str, str]:
    ours, equals, theirs = part.partition("=")
    if not equals or not ours.strip() or not theirs.strip():
        raise SettingsError(f"--columns {part.strip()!r}: expected OURS=THEIRS, like prompt=question")
    return ours.strip(), theirs.strip()


def rename(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """A row under our keys; a row without any of the named columns stays as it is."""
    if not any(theirs in row for theirs in columns.values()):
        return dict(row)
    rest = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return {ours: row[theirs] for ours, theirs in columns.items() if theirs in row} | rest


def hidden_by(row: Mapping[str, Any], columns: Columns) -> set[str]:
    """Keys of ours in a row that columns take the place of, so that nothing reads them."""
    if not any(theirs in row for theirs in columns.values()):
        return set()
    replaced = {ours for ours, theirs in columns.items() if theirs != ours} - set(columns.values())
    return {key for key in replaced if row.get(key) is not None}


class Cells(dict[str, Any]):
    """A row of a table, whose cells may hold a list as JSON text."""


def parsed(value: Any, where: str) -> Any:
    """A list that is written as JSON text, as in a cell of a table; everything else as it is.

    Raises:
        DataError: if it has a key twice.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value, object_pairs_hook=each_key_once)
        except (json.JSONDecodeError, RecursionError):
            return value
        except ValueError as cause:
            if "twice" in str(cause):
                raise DataError(f"{where}: JSON in a cell has {cause}") from None
    return value
