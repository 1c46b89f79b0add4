"""Conversations as questions: what stands before an assistant's turn, and where the model's own turn ends."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sculptor.data.chat import messages_as_rendered
from sculptor.data.conversations import short
from sculptor.data.edges import answer_end, special_ids, tell_language, tell_other_end
from sculptor.data.row_types import CompletionRow, MessagesRow, Row, settle
from sculptor.errors import DataError

_MARK = "\u241e"  # stands for what is said
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked.

    Attributes:
        ids: the prompt's tokens.
        text: the prompt as it is rendered.
        expected: what answers are right.
        whole: the turn as the row has it, thinking included.
    """

    ids: list[int]
    text: str
    expected: tuple[str, ...]
    whole: str


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
        messages = messages_as_rendered(row, tokenizer)
        text = render_question(tokenizer, messages[:last], row.tools, dict(row.template_options))
        said = str(messages[last].get("content") or "")
        if messages[last].get("tool_calls"):
            said = _called(row, messages[: last + 1], text, tokenizer)
    except DataError:
        raise
    except Exception as cause:  # templates are programs
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise DataError(f"{row.where}: the chat template does not take these messages ({reason})") from cause
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return Question(ids, text, tuple(answer_part(answer) for answer in (said, *row.references)), said)


def _called(row: MessagesRow, messages: Sequence[Any], before: str, tokenizer: Any) -> str:
    """What a turn with calls says, as its template writes it, up to where it ends."""
    options = dict(row.template_options)
    whole: str = tokenizer.apply_chat_template(list(messages), tools=list(row.tools) or None, tokenize=False, **options)
    if not whole.startswith(before):
        raise DataError(
            f"{row.where}: the chat template writes a turn with calls in another way than it asks for it: answers cannot be "
            "compared; leave out --exact-match"
        )
    ids = list(tokenizer(whole[len(before) :], add_special_tokens=False, verbose=False).input_ids)
    end = next((at for at, token in enumerate(ids) if token in end_ids(tokenizer)), len(ids))
    return spoken(tokenizer, ids[:end])


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """What tokens of an answer say, special ones included: they may be what is asked for."""
    found: str = tokenizer.decode(ids, skip_special_tokens=False)
    return found.strip()


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
    return _template_end(tokenizer) | {answer_end(tokenizer)}


def turn_end(tokenizer: Any) -> int:
    """The token that ends an answer of a conversation, as one is learned: the template's, else the tokenizer's; or `NO_TOKEN`."""
    return min(_template_end(tokenizer), default=answer_end(tokenizer))


def _template_end(tokenizer: Any) -> frozenset[int]:
    """The special token that the chat template writes behind the assistant's words, if there is one."""
    if not tokenizer.chat_template:
        return frozenset()
    talk = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK * 2}]
    try:
        behind = tokenizer.apply_chat_template(talk, tokenize=False).rpartition(_MARK * 2)[2]
    except Exception:  # templates refuse what they like
        return frozenset()
    following = tokenizer(behind.strip(), add_special_tokens=False).input_ids[:1]
    return frozenset(following) & special_ids(tokenizer)


def tell_ends(rows: Sequence[Row], tokenizer: Any, notice: Callable[[str], object]) -> None:
    """Tells, in a line each, what of answers' ends and languages is not as one would think, if anything is."""
    tell_other_end(rows, tokenizer, notice)
    if any(isinstance(row, MessagesRow) for row in rows):
        tell_unstopped(tokenizer, notice)
        tell_roles(rows, tokenizer, notice)
    tell_language(rows, tokenizer, notice)


def tell_plain(rows: Sequence[Row], tokenizer: Any, notice: Callable[[str], object]) -> None:
    """Tells, in one line, of prompts that a model which talks is taught as they stand; they may be meant as questions."""
    if not tokenizer.chat_template:
        return
    marks = set(tokenizer.all_special_tokens)
    prompts = [settled.prompt for row in rows if isinstance(settled := settle(row, True), CompletionRow)]
    count = sum(not any(mark in prompt for mark in marks) for prompt in prompts)  # else somebody applied a template
    if count:
        notice(
            f"{count:,} of {len(rows):,} rows are a prompt and its completion, which are learned as they stand, without the chat "
            'template; for a conversation give {"messages": [...]}'
        )


def tell_roles(rows: Iterable[Row], tokenizer: Any, notice: Callable[[str], object]) -> None:
    """Tells, in one line, of roles that are nobody's own and that the chat template does not name, if there are any."""
    template = str(tokenizer.chat_template)
    counts = Counter(
        role
        for row in rows
        if isinstance(row, MessagesRow)
        for role in dict.fromkeys(str(message["role"]) for message in row.messages)
        if role not in _ROLES and not any(f"{quote}{role}{quote}" in template for quote in "'\"")
    )
    if counts:
        named = ", ".join(f"{short(role)} in {count:,} row{'s' if count > 1 else ''}" for role, count in counts.items())
        notice(f"roles that the chat template has no name for, which it writes as any other, without loss: {named}")


def tell_unstopped(tokenizer: Any, notice: Callable[[str], object]) -> None:
    """Tells, in one line, of a chat template that ends turns where generation goes on, if it does.

    Where it goes on, `evaluate` and `chat` stop all the same, and other programs do not.
    """
    ends, stops = _template_end(tokenizer), getattr(tokenizer, "stops", None)
    if stops is None or not ends or ends & stops:
        return
    (end,) = ends
    notice(
        f"the chat template ends turns with {tokenizer.convert_ids_to_tokens(end)}, where generation does not stop: programs "
        f"that go by generation_config.json speak on behind every answer; add {end} to its eos_token_id, before training"
    )
