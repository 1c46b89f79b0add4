"""What a chat template leaves out of a conversation: it would be trained without it, and nobody would know."""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from sculptor.errors import DataError

Message = dict[str, Any]
_THOUGHT = re.compile(r"<think>(.*?\S.*?)</think>", re.DOTALL)
_KEPT: set[Hashable] = set()  # forms of conversations of which templates are known to leave out nothing
_MOST_KEPT = 10_000
_PARTS = (("name", "arguments"), ("name",), ("arguments",))  # of a call
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# What is looked at by other checks, or decides nothing that is said.
_LOOKED_AT = ("role", "content", "tool_calls", *THOUGHTS)


def refuse_left_out(
    where: str,
    messages: Sequence[Message],
    trained: Sequence[int],
    render: Callable[[Sequence[Message]], str],
    kind: Hashable,
) -> None:
    """Refuses content, calls and the thinking of trained turns that change nothing in what a template renders.

    Each is changed once for every form of conversation: roles, what messages have, which turns are trained; and where it does
    not stand in the rendered text as it is.

    Args:
        where: file and line.
        messages: as the template gets them.
        trained: turns with loss.
        render: the template.
        kind: what else decides what it renders.

    Raises:
        DataError: naming the message.
    """
    turns = tuple(
        (
            message["role"],
            i in trained,
            tuple(sorted(key for key in message if says(message[key]))),
            len(message.get("tool_calls") or ()),
            _THOUGHT.search(str(message.get("content"))) is not None,
        )
        for i, message in enumerate(messages)
    )
    known = (kind, turns) in _KEPT
    whole = render(messages) if known else ""
    for i, message in enumerate(messages):
        # A form that is known tells nothing of a template that cuts what is long.
        if not known or not _stands_in(whole, message, i in trained):
            _check(where, messages, i, i in trained, message, render)
    if len(_KEPT) < _MOST_KEPT:
        _KEPT.add((kind, turns))


def _check(
    where: str,
    messages: Sequence[Message],
    i: int,
    trained: bool,
    message: Message,
    render: Callable[[Sequence[Message]], str],
) -> None:
    # A trained turn is looked at as the last one, which is how it is trained where earlier ones are written otherwise.
    behind = [] if trained else messages[i + 1 :]
    seen = render([*messages[: i + 1], *behind])

    def lost(changed: Message) -> bool:
        try:
            return render([*messages[:i], changed, *behind]) == seen
        except Exception:  # templates refuse what they like
            return False

    for number in range(len(message.get("tool_calls") or ())):
        for parts in _PARTS:
            other = _other_call(message["tool_calls"], number, parts)
            if other != message["tool_calls"] and lost(message | {"tool_calls": other}):
                part = " " if len(parts) > 1 else f" the {parts[0]} of "
                raise _left_out(where, i, message, f"{part}call {number + 1} of")
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        if any(lost(message | {"content": changed}) for changed in _changes(content)):
            raise _left_out(where, i, message, "")
        thought = _THOUGHT.search(content) if trained else None
        if thought and lost(message | {"content": content.replace(thought[1], thought[1] + " .", 1)}):
            raise _left_out(where, i, message, " thinking in its content of")
    for key in THOUGHTS:
        if trained and says(message.get(key)) and lost({k: v for k, v in message.items() if k != key}):
            others = (name for name in THOUGHTS if name not in message)
            read = next((name for name in others if not lost(message | {name: message[key]})), None)
            remedy = (
                f"rename it to {read!r}, which it renders"
                if read
                else "choose another with --chat-template, or remove the key"
            )
            raise DataError(f"{where}: the chat template renders nothing of turn {i + 1}'s {key}; {remedy}")


def _changes(content: str) -> list[str]:
    """A text with something more at its end, and before and inside it where no thinking is that may be dropped."""
    if "</think>" in content:
        return [f"{content} ."]
    half = len(content) // 2
    return [f"{content} .", f". {content}", f"{content[:half]} . {content[half:]}"]


def _stands_in(text: str, message: Message, trained: bool) -> bool:
    """Whether what a message says stands in the rendered text, thinking that may be dropped aside."""
    content = str(message.get("content") or "")
    parts = [content.rpartition("</think>")[2], *(_THOUGHT.findall(content) if trained else ())]
    parts += [str(message[key]) for key in THOUGHTS if trained and says(message.get(key))]
    return all(part.strip() in text for part in parts)


def silent_keys(messages: Sequence[Message], render: Callable[[Sequence[Message]], str | None]) -> tuple[str, ...]:
    """Keys of messages that change nothing in what a template renders, beside those that are refused then."""
    seen = render(messages)
    found = set()
    for key in {key for message in messages for key in message if key not in _LOOKED_AT and says(message[key])}:
        if render([{k: v for k, v in message.items() if k != key} for message in messages]) == seen:
            found.add(key)
    return tuple(sorted(found))


def _left_out(where: str, i: int, message: Message, part: str) -> DataError:
    of = "the system message" if message["role"] == "system" else f"message {i + 1} ({message['role']})"
    return DataError(
        f"{where}: the chat template leaves out{part} {of}; choose another with --chat-template, or remove it"
    )


def says(value: Any) -> bool:
    """Whether a part of a message holds anything."""
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _other_call(calls: Sequence[Any], number: int, parts: Sequence[str]) -> list[Any]:
    """The calls with another name or other arguments in one of them; by themselves only what is there is changed."""

    def renamed(call: Any) -> Any:
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            return call | {"function": renamed(call["function"])}
        if not isinstance(call, dict):
            return call
        given = call.get("arguments")
        arguments = given | {"x": 0} if isinstance(given, dict) else f"{given or ''} "
        changed = {"name": f"{call.get('name')}x", "arguments": arguments}
        return call | {part: changed[part] for part in parts if len(parts) > 1 or call.get(part)}

    return [renamed(call) if i == number else call for i, call in enumerate(calls)]
