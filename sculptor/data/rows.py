"""Rows of JSONL and text files, told apart by their keys."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculptor.errors import DataError


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text; the loss is on all of it."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt and what should follow it; the loss is on the completion and the end of sequence."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class MessagesRow:
    """A conversation; the loss is on the assistant's turns."""

    where: str
    messages: tuple[dict[str, Any], ...]


Row = TextRow | CompletionRow | MessagesRow


def read_rows(paths: Sequence[str | Path], max_rows: int | None = None) -> list[Row]:
    """All rows of the files, or the first of each, in order; a .txt file is one row.

    Raises:
        DataError: with file and line number, for a row that is broken, empty or of unknown keys.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except IsADirectoryError:
            raise DataError(f"{path}: is a directory; name the data files in it") from None
        except FileNotFoundError:
            raise DataError(f"{path}: no such data file") from None
        except (OSError, UnicodeDecodeError) as cause:
            raise DataError(f"{path}: not readable as UTF-8 text ({cause})") from cause
        before = len(rows)
        if path.suffix == ".txt":
            rows += [TextRow(f"{path}", text)] if text.strip() else []
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip() and (max_rows is None or len(rows) - before < max_rows):
                    rows.append(_parse(line, f"{path}:{number}"))
        if len(rows) == before:
            raise DataError(f"{path}: no rows; expected JSONL with messages, prompt and completion, or text")
    return rows


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as cause:
        raise DataError(f"{where}: broken JSON ({cause.msg} at column {cause.colno})") from cause
    except RecursionError:
        raise DataError(f"{where}: broken JSON (nested too deeply)") from None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        raise DataError(f"{where}: half a surrogate pair ({cause.reason}); not valid text") from cause
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if "messages" in row:
        return MessagesRow(where, _messages(row["messages"], where))
    if "prompt" in row and "completion" in row:
        prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
        if not completion.strip():
            raise DataError(f"{where}: empty completion")
        return CompletionRow(where, prompt, completion)
    if "text" in row:
        return TextRow(where, _text(row, "text", where))
    raise DataError(
        f"{where}: keys {', '.join(map(repr, sorted(row))) or '(none)'}; "
        "expected 'messages', 'prompt' and 'completion', or 'text'"
    )


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{where}: {key!r} is {type(row[key]).__name__}; expected a string")
    value: str = row[key]
    return value


def _messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise DataError(f"{where}: a message needs 'role' and a string 'content'")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no assistant turn; the loss is on assistant turns only")
    return tuple(messages)
