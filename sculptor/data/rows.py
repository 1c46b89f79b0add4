"""Rows of JSONL and text files, told apart by their keys."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from sculptor.errors import DataError
from sculptor.validation import each_key_once

_EXPECTED = "'messages', 'prompt' and 'completion', or 'text'"
_CONVERT = "datasets.load_dataset(...).to_json(FILE) writes it"
# Arguments of a template that are not the row's to give.
_OWN_OPTIONS = frozenset(
    ("add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "tools", "conversation", "return_dict",
     "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs")
)  # fmt: skip
_SHOWN = 8  # keys that a message lists


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
    """A conversation; the loss is on the assistant's turns, unless one says otherwise.

    Attributes:
        where: file and line.
        messages: as a chat template takes them.
        trained: per message, whether the loss is on it.
        tools: definitions that go to the template.
        template_options: further arguments of the template, in pairs.
    """

    where: str
    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[Any, ...] = ()
    template_options: tuple[tuple[str, Any], ...] = ()


Row = TextRow | CompletionRow | MessagesRow


def read_rows(paths: Sequence[str | Path], max_rows: int | None = None) -> list[Row]:
    """All rows of the files, or the first of each, in order; a .txt file is one row.

    Raises:
        DataError: with file and line number, for a row that is broken, empty or of unknown keys.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        text = _read_text(path)
        before = len(rows)
        if path.suffix.lower() == ".txt":
            rows += [TextRow(f"{path}", text)] if text.strip() else []
        else:
            _refuse_other_formats(path, text)
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip() and (max_rows is None or len(rows) - before < max_rows):
                    rows.append(_parse(line, f"{path}:{number}"))
        if len(rows) == before:
            raise DataError(f"{path}: no rows; expected JSONL with {_EXPECTED}, or text")
    return rows


def digest_rows(rows: Iterable[Row]) -> str:
    """SHA-256 over what rows say, wherever their files are."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((type(row).__name__, astuple(row)[1:])).encode())
    return found.hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        saved = any((path / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))
        what = "a saved dataset; write it with to_json(FILE)" if saved else "a directory; name the data files in it"
        raise DataError(f"{path}: is {what}") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except UnicodeDecodeError as cause:
        kinds = {".parquet": "Parquet", ".gz": "gzip", ".zst": "zstd", ".zip": "zip", ".arrow": "Arrow", ".xz": "xz"}
        if path.suffix.lower() in kinds:
            raise DataError(f"{path}: a {kinds[path.suffix.lower()]} file; expected JSONL; {_CONVERT}") from None
        raise DataError(f"{path}: not readable as UTF-8 text ({cause})") from cause
    except (OSError, ValueError) as cause:
        raise DataError(f"{path}: not readable ({cause})") from cause


def _refuse_other_formats(path: Path, text: str) -> None:
    """Names a format that is not read, before its first line is called broken JSON."""
    start = text.lstrip()[:1]
    if path.suffix.lower() in (".csv", ".tsv") and start != "{":
        raise DataError(f"{path}: a table ({path.suffix.lower()[1:].upper()}); expected JSONL; {_CONVERT}")
    if start == "[":
        raise DataError(f"{path}: a JSON array; expected JSONL, one object per line; {_CONVERT}")
    if start == "{" and len(text) > 1 and text.lstrip()[1:2] in ("\n", "\r"):
        raise DataError(f"{path}: JSON over several lines; expected JSONL, one object per line; {_CONVERT}")


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line, object_pairs_hook=each_key_once)
    except json.JSONDecodeError as cause:
        raise DataError(f"{where}: broken JSON ({cause.msg} at column {cause.colno})") from cause
    except RecursionError:
        raise DataError(f"{where}: broken JSON (nested too deeply)") from None
    except ValueError as cause:  # a number of thousands of digits
        raise DataError(f"{where}: broken JSON ({str(cause).split(';')[0]})") from cause
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        raise DataError(f"{where}: half a surrogate pair ({cause.reason}); not valid text") from cause
    except RecursionError:
        raise DataError(f"{where}: broken JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if "messages" in row:
        return _conversation(row, row["messages"], where)
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):  # as TRL has conversations
            return _conversation(row, [*row["prompt"], *row["completion"]], where, len(row["prompt"]))
        prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
        if not completion.strip():
            raise DataError(f"{where}: empty completion")
        return CompletionRow(where, prompt, completion)
    if "text" in row:
        return TextRow(where, _text(row, "text", where))
    keys = ", ".join(_short(key) for key in sorted(row)[:_SHOWN]) or "(none)"
    more = f" and {len(row) - _SHOWN} more" if len(row) > _SHOWN else ""
    raise DataError(f"{where}: keys {keys}{more}; expected {_EXPECTED}{_hint(row)}")


def _hint(row: Mapping[str, Any]) -> str:
    """What a row of another well-known form is called, and what would make it one of ours."""
    if "conversations" in row:
        return "; ShareGPT's form: rename 'conversations' to 'messages', 'from' to 'role', 'value' to 'content'"
    if "instruction" in row:
        return "; Alpaca's form: 'prompt' is 'instruction' with 'input', 'completion' is 'output'"
    if "chosen" in row and "rejected" in row:
        return "; preference pairs: only what is chosen can be trained, as 'completion'"
    return ""


def _short(key: str) -> str:
    line = ascii(key)
    return line if len(line) <= 40 else line[:38] + "…'"


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{where}: {key!r} is {type(row[key]).__name__}; expected a string")
    value: str = row[key]
    return value


def _conversation(row: Mapping[str, Any], messages: Any, where: str, start: int = 0) -> MessagesRow:
    """A conversation with what else a row says of it; turns before `start` carry no loss."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is not a list of messages")
    cleaned, trained = [], []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise DataError(f"{where}: message {i} is no object with a 'role'")
        on = _weight(message, f"{where}: message {i}")
        if on and message["role"] != "assistant" and ("weight" in message or "train" in message):
            raise DataError(f"{where}: message {i} is of role {message['role']!r}; only the assistant's can be trained")
        trained.append(on and message["role"] == "assistant" and i > start)
        cleaned.append(_message(message, f"{where}: message {i}"))
    if not any(message["role"] == "assistant" for message in messages[start:]):
        raise DataError(f"{where}: no assistant turn; the loss is on assistant turns only")
    if not any(trained):
        raise DataError(f"{where}: every assistant turn is left out ('weight' 0 or 'train' false); remove the row")
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: 'tools' is text that is no JSON") from None
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' is not a list of definitions")
    if not isinstance(options, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' is not an object")
    ours = sorted(set(options) & _OWN_OPTIONS)
    if ours:
        raise DataError(
            f"{where}: 'chat_template_kwargs' has {ours[0]!r}, which decides where turns begin and end; remove it"
        )
    return MessagesRow(where, tuple(cleaned), tuple(trained), tuple(tools), tuple(sorted(options.items())))


def _weight(message: Mapping[str, Any], where: str) -> bool:
    """Whether a turn is trained: `weight` 0 or 1 (OpenAI), `train` or `training` true or false (others)."""
    found = {key: message[key] for key in ("weight", "train", "training") if message.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) is (key == "weight") or value not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise DataError(f"{where} has {key} {str(value)[:40]}; expected {expected}")
    return all(found.values())


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates take it: its content is text, or null beside tool calls."""
    kept = {key: value for key, value in message.items() if key not in ("weight", "train", "training")}
    content = kept.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise DataError(f"{where} has content that is not text; only text can be trained")
        kept["content"] = "".join(part["text"] for part in content)
    elif content is None:
        if not kept.get("tool_calls"):
            raise DataError(f"{where} has no 'content' and no 'tool_calls'")
        kept["content"] = ""
    elif not isinstance(content, str):
        raise DataError(f"{where} has 'content' of type {type(content).__name__}; expected text")
    return kept
