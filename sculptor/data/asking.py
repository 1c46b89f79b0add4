"""Conversations as questions: what stands before an assistant's turn, and where the model's own turn ends."""

import functools
from dataclasses import dataclass
from typing import Any

from sculptor.data.edges import answer_end, special_ids
from sculptor.data.row_types import MessagesRow
from sculptor.errors import DataError

_MARK = "\u241e"  # stands for what is said


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked.

    Attributes:
        ids: the prompt's tokens.
        text: the prompt as it is rendered.
        expected: what answers are right.
    """

    ids: list[int]
    text: str
    expected: tuple[str, ...]


def question_of(row: MessagesRow, tokenizer: Any) -> Question:
    """The last trained turn of a conversation as the answer to all that comes before it.

    Raises:
        DataError: with file and line, if nothing comes before it, or the template does not take it.
    """
    last = max(i for i, on in enumerate(row.trained) if on)
    if not last:
        raise DataError(f"{row.where}: nothing is asked before the assistant speaks")
    if not tokenizer.chat_template:
        raise DataError(f"{row.where}: 'messages' rows need a chat template; give one with --chat-template")
    try:
        text = render_question(tokenizer, row.messages[:last], row.tools, dict(row.template_options))
    except Exception as cause:  # templates are programs
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise DataError(f"{row.where}: the chat template does not take these messages ({reason})") from cause
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    said = str(row.messages[last].get("content") or "")
    return Question(ids, text, tuple(answer_part(answer) for answer in (said, *row.references)))


def render_question(tokenizer: Any, messages: Any, tools: Any = (), options: Any = None) -> str:
    """What stands before the model's turn."""
    found: str = tokenizer.apply_chat_template(
        list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True, **(options or {})
    )
    return found


def answer_part(text: str) -> str:
    """What is said behind the thinking, without white space around it."""
    return text.rpartition("</think>")[2].strip()


@functools.lru_cache(maxsize=8)
def end_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn: the end of sequence, and what the chat template writes behind the assistant's words."""
    ends = {answer_end(tokenizer)}
    if tokenizer.chat_template:
        talk = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK * 2}]
        try:
            behind = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(_MARK * 2)[2]
        except Exception:  # templates refuse what they like
            behind = ""
        following = tokenizer(behind.strip(), add_special_tokens=False).input_ids[:1]
        ends |= set(following) & special_ids(tokenizer)
    return frozenset(ends)
