"""Conversations as people write them, to messages as chat templates take them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sculptor.data.columns import parsed
from sculptor.data.row_types import MessagesRow
from sculptor.errors import DataError
from sculptor.validation import each_key_once

# Arguments of a template that are not the row's to give.
_OWN_OPTIONS = frozenset(
    ("add_generation_prompt", "continue_final_message", "tokenize", "chat_template", "tools", "conversation", "return_dict",
     "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs")
)  # fmt: skip
# OpenAI's key, and those of others.
_TRAINED_BY = ("weight", "train", "training")
_WEIGHTS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
# ShareGPT's speakers, and those of its relatives.
_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
# What other programs call the roles of chat templates, in any case of letters.
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "tool")}, "human": "user", "tool_response": "tool",
    **{role: "assistant" for role, meant in _SPEAKERS.items() if meant == "assistant"}, "ai": "assistant",
    "tool_call": "assistant",
}  # fmt: skip


def short(key: object) -> str:
    """A name from a file, fit for a message."""
    line = ascii(key)
    return line if len(line) <= 40 else line[:38] + "…'"


def conversation(row: Mapping[str, Any], messages: Any, where: str, start: int = 0) -> MessagesRow:
    """A conversation with what else a row says of it; turns before `start` carry no loss.

    Raises:
        DataError: with file and line.
    """
    messages = parsed(messages, where)
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: 'messages' is not a list of messages")
    if system := row.get("system"):
        messages, start = [_system(system, messages[0], where), *messages], start + 1
    cleaned, trained = [], []
    for i, given in enumerate(messages, 1):
        message = _spoken(given, f"{where}: message {i}")
        on = is_trained(message, f"{where}: message {i}")
        if on and message["role"] != "assistant" and any(message.get(key) is not None for key in _TRAINED_BY):
            raise DataError(f"{where}: message {i} is of role {message['role']!r}; only the assistant's can be trained")
        trained.append(on and message["role"] == "assistant" and i > start)
        cleaned.append(_message(message, f"{where}: message {i}"))
    if not any(message["role"] == "assistant" for message in cleaned[start:]):
        roles = list(dict.fromkeys(str(message["role"]) for message in cleaned))
        theirs = any(_SPEAKERS.get(role, role) != role for role in roles)
        raise DataError(
            f"{where}: no assistant turn, and the loss is on these only; roles are {', '.join(map(short, roles))}"
            + ("; ShareGPT's speakers belong in 'conversations'" if theirs else "")
        )
    if not any(trained):
        raise DataError(f"{where}: every assistant turn is left out ('weight' 0 or 'train' false); remove the row")
    return MessagesRow(where, tuple(cleaned), tuple(trained), _tools(row, where), _options(row, where))


def _system(text: Any, first: Any, where: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise DataError(f"{where}: 'system' is {type(text).__name__}; expected a string")
    if isinstance(first, Mapping) and "system" in (first.get("role"), first.get("from")):
        raise DataError(f"{where}: 'system' beside a system message; remove one of them")
    return {"role": "system", "content": text}


def _tools(row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    tools = row.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools, object_pairs_hook=each_key_once)
        except (ValueError, RecursionError) as cause:
            what = f"has {cause}" if "twice" in str(cause) else "is text that is no JSON"
            raise DataError(f"{where}: 'tools' {what}") from None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' is not a list of definitions")
    return tuple(tools)


def _options(row: Mapping[str, Any], where: str) -> tuple[tuple[str, Any], ...]:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise DataError(f"{where}: 'chat_template_kwargs' is not an object")
    ours = sorted(set(options) & _OWN_OPTIONS)
    if ours:
        raise DataError(
            f"{where}: 'chat_template_kwargs' has {ours[0]!r}, which decides where turns begin and end; remove it"
        )
    return tuple(sorted(options.items()))


def is_trained(given: Mapping[str, Any], where: str) -> bool:
    """Whether a row or a turn is trained: `weight` 0 or 1 (OpenAI), `train` or `training` true or false (others).

    Cells of tables are texts, `0` or `1.0`, `True` or `false`.

    Raises:
        DataError: for any other value.
    """
    found = {key: _of_cell(key, given[key]) for key in _TRAINED_BY if given.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) is (key == "weight") or value not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise DataError(f"{where} has {key} {json.dumps(value, default=str)[:40]}; expected {expected}")
    return all(found.values())


def _of_cell(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    cells: Mapping[str, Any] = _WEIGHTS if key == "weight" else {"true": True, "false": False}
    return cells.get(value.strip().lower(), value)


def _spoken(given: Any, where: str) -> dict[str, Any]:
    """A message with a role, also if it is in ShareGPT's words; without what is null."""
    if not isinstance(given, Mapping):
        raise DataError(
            f"{where} is {short(given)}, no object with a 'role'; a prompt that is no conversation is one text"
        )
    message = {key: value for key, value in given.items() if value is not None or key == "content"}
    if "role" not in message and isinstance(message.get("from"), str):
        if message["from"] not in _SPEAKERS:
            raise DataError(f"{where} is from {short(message['from'])}; expected {', '.join(_SPEAKERS)}")
        calls = message["from"] == "function_call"
        message = {"role": _SPEAKERS[message["from"]], "content": message.get("value")} | {
            key: value for key, value in message.items() if key not in ("from", "value", "content")
        }
        return _call(message, where) if calls else message
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} is no object with a 'role'")
    meant = _ROLES.get(role.lower(), role)
    if role == meant:
        return message
    if meant != "assistant":
        raise DataError(f"{where} is of role {short(role)}, which chat templates call {meant!r}")
    calls = ", a call in its 'tool_calls'" if role.lower() in ("function_call", "tool_call") else ""
    raise DataError(
        f"{where} is of role {short(role)}, on which there would be no loss; turns that are learned are of role "
        f"'assistant'{calls}"
    )


def _call(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A turn that is a call, which ShareGPT's relatives write as JSON."""
    try:
        found = json.loads(message["content"], object_pairs_hook=each_key_once)
    except (TypeError, ValueError, RecursionError) as cause:
        what = f" ({cause})" if "twice" in str(cause) else ""
        raise DataError(f"{where} is a function_call whose value is no JSON{what}") from None
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"{where} is a function_call without a 'name'")
    return message | {"content": None, "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates take it: its content is text, or null beside tool calls."""
    kept = {key: value for key, value in message.items() if key not in _TRAINED_BY}
    content = kept.get("content")
    if isinstance(content, list | tuple):
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
    if "tool_calls" in kept:
        _check_arguments(kept["tool_calls"], where)
    return kept


def _check_arguments(calls: Any, where: str) -> None:
    """Arguments are handed on as they are; of JSON text with a key twice a template would get one of the values."""
    for call in calls if isinstance(calls, list | tuple) else ():
        inner = call.get("function", call) if isinstance(call, dict) else None
        arguments = inner.get("arguments") if isinstance(inner, dict) else None
        if isinstance(arguments, str):
            try:
                json.loads(arguments, object_pairs_hook=each_key_once)
            except (ValueError, RecursionError) as cause:
                if "twice" in str(cause):
                    raise DataError(f"{where} has a call with {cause} in its arguments") from None


# Arguments that stand nowhere but in a call.
_UNHEARD_OF = {"\u241e": "\u2302"}


def prints_objects(
    render: Callable[[Sequence[dict[str, Any]]], str | None], messages: Sequence[dict[str, Any]]
) -> bool:
    """Whether a template writes arguments as Python shows objects, and not as JSON: it wants their text.

    Args:
        render: the template; None where it does not take messages.
        messages: with arguments as objects.
    """
    text = render([_with_arguments(message, _unheard_of) for message in messages])
    return text is not None and str(_UNHEARD_OF) in text


def arguments_parsed(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as objects: APIs give them as JSON text, templates want to write it themselves."""
    return _with_arguments(message, _parsed)


def arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as JSON text, for templates that write them as they are."""
    return _with_arguments(message, _told)


def _with_arguments(message: dict[str, Any], made: Callable[[Any], Any]) -> dict[str, Any]:
    """A message with other arguments in its calls."""
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_with(call, made) for call in calls]} if isinstance(calls, list) else message


def _with(call: Any, made: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _with(call["function"], made)}
    return call | {"arguments": made(call["arguments"])} if "arguments" in call else call


def _unheard_of(given: Any) -> Any:
    return _UNHEARD_OF if isinstance(given, dict) and given else given


def _told(given: Any) -> Any:
    return json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given


def _parsed(given: Any) -> Any:
    try:
        found = json.loads(given)  # of which no key is there twice: rows are checked
    except (TypeError, ValueError, RecursionError):
        return given
    return found if isinstance(found, dict) else given
