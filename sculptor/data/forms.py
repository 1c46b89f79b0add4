"""The form of a row, told by its keys: our own three, and those that other tools write."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sculptor.data.columns import Cells, Columns, hidden_by, parsed, rename
from sculptor.data.conversations import conversation, is_trained, short
from sculptor.data.labelled import EXPECTED_LABELLED, KEYS, Classes, labelled, usual_columns
from sculptor.data.row_types import CompletionRow, MessagesRow, Row, TextRow
from sculptor.errors import DataError

EXPECTED = "'messages', 'prompt' and 'completion', or 'text'"
_SHOWN = 8  # keys that a message lists
_OF_ROWS = ("weight", "train", "training")
_ANSWERS = ("completion", "choices", "references")
_OF_CONVERSATIONS = ("messages", "tools", "chat_template_kwargs", "system", "references")
# Columns that people have for what we call prompt and completion.
_USUAL = (
    ("question", "answer"), ("query", "response"), ("query", "answer"), ("question", "response"), ("source", "target"),
    ("input", "target"), ("inputs", "targets"), ("input", "output"), ("prompt", "response"), ("prompt", "answer"),
    ("prompt", "output"), ("prompt", "target"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recognised:
    """What became of a row.

    Attributes:
        row: None if the row says that it is not trained.
        form: in a few words.
        is_ours: it is one of our own forms, so that there is nothing to say of it.
        unread: keys that nothing looked at.
    """

    row: Row | None
    form: str
    is_ours: bool
    unread: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Form:
    name: str
    is_ours: bool
    tells: Callable[[Mapping[str, Any]], bool]
    reads: tuple[str, ...]
    make: Callable[[Mapping[str, Any], str], Row]


def recognise(given: Any, where: str, columns: Columns, classes: Classes | None = None) -> Recognised:
    """A row of any form.

    Args:
        given: keys and values.
        where: for messages.
        columns: our key -> their column.
        classes: take it as text and label, for these classes.

    Raises:
        DataError: if it is of none, or of several.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise DataError(f"{where}: expected a JSON object, found {type(given).__name__}")
    named = {key: value for key, value in rename(given, columns).items() if value is not None}
    lists = _lists_of_messages(named, where)
    if isinstance(given, Cells):
        if len(lists) == 1 and named.keys() >= {"prompt", "completion"}:
            raise DataError(
                f"{where}: {next(iter(lists))!r} is a list of messages, the other is not; both have to be one or the other"
            )
        named |= lists
    _check_text(named, where)
    forms = [form for form in (_FORMS if classes is None else [_labelled_form(classes)]) if form.tells(named)]
    if len(forms) > 1 and columns:
        forms = [form for form in forms if set(form.reads) & set(columns)] or forms
    if not forms and classes is not None:
        raise DataError(f"{where}: keys {_listed(named)}; expected {EXPECTED_LABELLED}{usual_columns(named)}")
    if not forms:
        raise DataError(f"{where}: keys {_listed(named)}; expected {EXPECTED}{_hint(named)}")
    if len(forms) > 1:
        ways = " or ".join(f"--columns {form.reads[0]}={form.reads[0]}" for form in forms)
        names = " and ".join(form.name for form in forms)
        raise DataError(f"{where}: could be {names}; choose one with {ways}, or remove the keys of the others")
    form = forms[0]
    unread = hidden_by(given, columns) | set(named) - {*form.reads, *_OF_ROWS}
    if not is_trained(named, f"{where}: row"):
        return Recognised(None, form.name, form.is_ours, tuple(sorted(unread)))
    made = form.make(named, where)
    if isinstance(made, CompletionRow):
        unread |= named.keys() & {"tools", "chat_template_kwargs", "system"}
    renamed = [f"{columns[key]} as {key}" for key in form.reads if columns.get(key) in given]
    text = form.name + (f" ({', '.join(renamed)})" if renamed else "")
    as_texts = len(lists) == 2 and isinstance(made, CompletionRow)  # of JSON lines, which say what they mean
    text += ", texts that are lists of messages, read as texts" if as_texts else ""
    return Recognised(made, text, form.is_ours and not renamed and not as_texts, tuple(sorted(unread)))


def _labelled_form(classes: Classes) -> _Form:
    return _Form(
        "text and label", True, lambda row: "text" in row, KEYS, lambda row, where: labelled(row, where, classes)
    )


def _check_text(row: Mapping[str, Any], where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as cause:
        raise DataError(f"{where}: half a surrogate pair ({cause.reason}); not valid text") from cause
    except (RecursionError, ValueError):
        raise DataError(f"{where}: broken JSON (nested too deeply)") from None


def _hint(row: Mapping[str, Any]) -> str:
    """What would make a row of other keys one of ours."""
    if "chosen" in row and "rejected" in row:
        return "; preference pairs: only what is chosen can be trained, with --columns completion=chosen or messages=chosen"
    if "instruction" in row and "response" in row:
        more = ",input=context" if "context" in row else ""
        return f"; try --columns instruction=instruction{more},output=response"
    for prompt, completion in _USUAL:
        if prompt in row and completion in row:
            return f"; try --columns prompt={prompt},completion={completion}"
    mark = next((mark for mark in ";|\t," if len(row) == 1 and mark in next(iter(row))), None)
    return "" if mark is None else f"; columns are told apart by commas in .csv, by tabs in .tsv, not by {mark!r}"


def _listed(row: Mapping[str, Any]) -> str:
    keys = ", ".join(short(key) for key in sorted(row)[:_SHOWN]) or "(none)"
    return f"{keys} and {len(row) - _SHOWN} more" if len(row) > _SHOWN else keys


def listed_keys(counts: Mapping[str, int]) -> str:
    """Keys with how many rows have them; the first few."""
    keys = ", ".join(f"{short(key)} of {counts[key]:,} rows" for key in list(counts)[:_SHOWN])
    return f"{keys} and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else keys


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise DataError(f"{where}: {key!r} is {type(row[key]).__name__}; expected a string")
    value: str = row[key]
    return value


def _texts(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = parsed(row.get(key, ()), where)
    if (
        not isinstance(value, list | tuple)
        or not all(isinstance(item, str) and item.strip() for item in value)
        or (key in row and not value)
    ):
        raise DataError(f"{where}: {key!r} is not a list of texts that say something")
    return tuple(value)


def _make_text(row: Mapping[str, Any], where: str) -> Row:
    return TextRow(where, _text(row, "text", where))


def _make_pair(row: Mapping[str, Any], where: str) -> Row:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):  # as TRL has conversations
        if "choices" in row:
            raise DataError(f"{where}: 'choices' beside messages; ranking needs 'prompt' as a text")
        _check_wanted(row, where)
        return _with_references(conversation(row, [*prompt, *completion], where, len(prompt)), row, where)
    if isinstance(row["prompt"], list) and "completion" in row:
        raise DataError(
            f"{where}: 'prompt' is a list of messages, 'completion' is not; both have to be one or the other"
        )
    text, choices, references = (
        _text(row, "prompt", where),
        _texts(row, "choices", where),
        _texts(row, "references", where),
    )
    if "choices" in row and len(choices) < 2:
        raise DataError(f"{where}: {len(choices)} 'choices'; ranking needs at least 2")
    right = _right(row, choices, references, where)
    if not choices:
        _check_wanted(row, where)
    if not right.strip():
        raise DataError(f"{where}: empty completion")
    return CompletionRow(where, text, right, choices, references)


def _check_wanted(row: Mapping[str, Any], where: str) -> None:
    """Refuses what TRL's unpaired preferences call bad: it would be learned."""
    label = row.get("label")
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):  # as tables have it
        raise DataError(
            f"{where}: 'label' is false, as where a completion is not wanted; remove the row, or the key if it says something else"
        )


def _right(row: Mapping[str, Any], choices: tuple[str, ...], references: tuple[str, ...], where: str) -> str:
    """What a prompt's right answer is: the completion, the gold choice, or the first reference."""
    given = _text(row, "completion", where) if "completion" in row else None
    if not choices:
        return given if given is not None else references[0]
    if "gold" not in row:
        if given not in choices:
            raise DataError(f"{where}: 'choices' without 'gold', the number of the right one from 0")
        return given
    gold = row["gold"]
    number = int(gold) if isinstance(gold, str) and gold.isascii() and gold.isdigit() else gold
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
        raise DataError(f"{where}: 'gold' is {short(gold)}; expected the number of a choice, 0 to {len(choices) - 1}")
    if given is not None and given != choices[number]:
        raise DataError(
            f"{where}: 'completion' is {short(given)}, choice {number} is {short(choices[number])}; remove one"
        )
    return choices[number]


def _lists_of_messages(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Of prompt and completion, those that are texts of lists of messages; any other text is text, whatever it begins with."""
    texts = {key: row[key] for key in ("prompt", "completion") if isinstance(row.get(key), str)}
    found = {key: parsed(value, where) for key, value in texts.items()}
    return {
        key: value for key, value in found.items() if isinstance(value, list) and value and all(map(_is_message, value))
    }


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _with_references(made: MessagesRow, row: Mapping[str, Any], where: str) -> Row:
    return replace(made, references=_texts(row, "references", where))


def _make_messages(row: Mapping[str, Any], where: str) -> Row:
    return _with_references(conversation(row, row["messages"], where), row, where)


def _make_sharegpt(row: Mapping[str, Any], where: str) -> Row:
    key = "conversations" if "conversations" in row else "conversation"
    return _with_references(conversation(row, row[key], where), row, where)


def _make_alpaca(row: Mapping[str, Any], where: str) -> Row:
    """A conversation of two turns, and what it is for a model that does not talk."""
    parts = [_text(row, key, where) for key in ("instruction", "input") if key in row]
    asked = "\n\n".join(part for part in parts if part.strip())
    answer = _text(row, "output", where)
    if not asked.strip() or not answer.strip():
        raise DataError(f"{where}: empty {'instruction' if answer.strip() else 'output'}")
    history = parsed(row.get("history"), where) or []
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise DataError(f"{where}: 'history' is not a list of pairs")
    turns = [*(text for pair in history for text in pair), asked, answer]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    made = conversation(row, messages, where)
    alone = not history and not row.get("system")
    return _with_references(replace(made, plain=(f"{asked}\n", answer) if alone else None), row, where)


_FORMS = (
    _Form("messages", True, lambda row: "messages" in row, _OF_CONVERSATIONS, _make_messages),
    _Form(
        "ShareGPT's conversations as messages", False, lambda row: "conversations" in row or "conversation" in row,
        ("conversations", "conversation", *_OF_CONVERSATIONS[1:]), _make_sharegpt,
    ),
    _Form(
        "prompt and completion", True, lambda row: "prompt" in row and not row.keys().isdisjoint(_ANSWERS),
        ("prompt", "completion", "choices", "gold", "references", "tools", "chat_template_kwargs", "system"), _make_pair,
    ),
    _Form(
        "Alpaca's instruction, input and output: two turns, or prompt and completion for a model without a chat template",
        False, lambda row: "instruction" in row and "output" in row,
        ("instruction", "input", "output", "history", *_OF_CONVERSATIONS[1:]), _make_alpaca,
    ),
    _Form("text", True, lambda row: "text" in row, ("text",), _make_text),
)  # fmt: skip
