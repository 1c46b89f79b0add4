"""Conversations to token sequences: a chat template renders them, character offsets tell the assistant's tokens."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sculptor.data.conversations import arguments_as_text, arguments_parsed, prints_objects
from sculptor.data.edges import answer_end, special_ids
from sculptor.data.forms import listed_keys
from sculptor.data.left_out import THOUGHTS, Message, refuse_left_out, says, silent_keys
from sculptor.data.offsets import Span, token_places
from sculptor.data.row_types import MessagesRow, Row
from sculptor.errors import DataError, SettingsError

_MARKS = re.compile(r"\{%-?\s*generation\b")
# What no turn says: where a text differs from one with these, it is the turn's own.
_OPENING = 16  # characters
_OTHERS = ("\u241e", "\u2302")


class Rendered(NamedTuple):
    """One training sequence of a conversation.

    Attributes:
        ids: tokens.
        mask: per token, whether it carries loss.
        ended: an end of sequence was added, since the template gives the turn none.
        rewritten: the template says a turn that is learned in other words than the row does.
    """

    ids: list[int]
    mask: list[bool]
    ended: bool
    rewritten: bool = False


def use_template(tokenizer: Any, chosen: str | None) -> None:
    """Gives a tokenizer the chat template that `--chat-template` names: one of its own, or a file.

    Raises:
        SettingsError: if there is no such template.
    """
    own = tokenizer.chat_template
    if chosen is None:
        return
    if isinstance(own, dict) and chosen in own:
        tokenizer.chat_template = own[chosen]
        return
    path = Path(chosen)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as cause:
        names = f"; the tokenizer's own are {', '.join(sorted(own))}" if isinstance(own, dict) else ""
        raise SettingsError(
            f"--chat-template {chosen}: no readable file, and no template of that name{names}"
        ) from cause
    if not text.strip():
        raise SettingsError(f"--chat-template {chosen}: the file is empty")
    tokenizer.chat_template = text


def unread_keys(rows: Iterable[Row], tokenizer: Any) -> dict[str, int]:
    """Keys of messages that the chat template does nothing with, and of how many rows; each set of keys is tried once."""
    tried: dict[tuple[str, ...], tuple[str, ...]] = {}
    found: Counter[str] = Counter()
    for row in rows if tokenizer.chat_template else ():
        if isinstance(row, MessagesRow):
            keys = tuple(sorted({key for message in row.messages for key in message}))
            if keys not in tried:
                conversation = _Conversation(row, tokenizer)
                tried[keys] = silent_keys(conversation.messages, conversation._try)
            found.update(tried[keys])
    return dict(sorted(found.items()))


def tell_unread(name: str, rows: Iterable[Row], tokenizer: Any, notice: Callable[[str], object]) -> None:
    """Names keys of messages that the chat template does nothing with, if there are any, in one line."""
    found = unread_keys(rows, tokenizer)
    if found:
        notice(f"{name}: not read by the chat template, in messages: {listed_keys(found)}")


def check_use(rows: Iterable[Row], chosen: str | None) -> None:
    """Refuses a template for rows that have no use for one.

    Raises:
        SettingsError: if none is a conversation.
    """
    if chosen is not None and not any(isinstance(row, MessagesRow) for row in rows):
        raise SettingsError("--chat-template without effect: no row has 'messages'")


def messages_as_rendered(row: MessagesRow, tokenizer: Any) -> list[Message]:
    """A conversation as its template takes it: arguments of calls as objects, unless it wants them as text."""
    conversation = _Conversation(row, tokenizer)
    chosen = conversation.with_calls()
    called = any(message.get("tool_calls") for message in chosen)
    return conversation.with_text() if called and conversation._try(chosen) is None else chosen


def render_conversation(row: MessagesRow, tokenizer: Any) -> list[Rendered]:
    """The sequences to train on: one for the whole conversation, or one for each of its trained turns.

    Turns are trained one by one where the template writes earlier turns in another way than the last (it drops their
    thinking), or gives a turn no end but the start of the next.

    Raises:
        DataError: with file and line, if the template does not take the messages, or nothing is left to learn.
    """
    return _Conversation(row, tokenizer).sequences()


class _Conversation:
    def __init__(self, row: MessagesRow, tokenizer: Any) -> None:
        self.row = row
        self.tokenizer = tokenizer
        self.template = _template_text(row, tokenizer)
        self.messages = [dict(message) for message in row.messages]
        self.trained = [i for i, on in enumerate(row.trained) if on]

    def sequences(self) -> list[Rendered]:
        """As `render_conversation`."""
        try:
            try:
                return self._sequences(self.with_calls())
            except TypeError:  # a template that joins arguments as they are wants text
                return self._sequences(self.with_text())
        except (DataError, SettingsError):
            raise
        except Exception as cause:  # templates are programs; they fail in any way they like
            text = " ".join(str(cause).split())[:200] or type(cause).__name__
            raise DataError(f"{self.row.where}: the chat template does not take these messages ({text})") from cause

    def with_calls(self) -> list[Message]:
        """Its messages, arguments of calls as objects unless the template prints these as Python does."""
        with_objects = [arguments_parsed(message) for message in self.messages]
        called = any(message.get("tool_calls") for message in with_objects)
        return self.with_text() if called and prints_objects(self._try, with_objects) else with_objects

    def with_text(self) -> list[Message]:
        """Its messages, arguments of calls as JSON text."""
        return list(map(arguments_as_text, self.messages))

    def _sequences(self, messages: Sequence[Message]) -> list[Rendered]:
        self._check_rendered(messages)
        whole = self._render(messages)
        spans = [self._span(messages, i) for i in self.trained]
        if all(whole.startswith(self._prefix(messages, i)) for i in self.trained):
            marked = self._marked(messages, len(messages)) if _MARKS.search(self.template) else None
            last = self.trained[-1] == len(messages) - 1
            found = self._tokens(whole, spans, marked, last, self.trained[-1])
            # Earlier turns are to learn their end, too, and the last one where another message follows it.
            endless = found.ended and len(spans) > 1 if last else self._alone(messages, self.trained[-1]).ended
            return [self._alone(messages, i) for i in self.trained] if endless else [found]
        return [self._alone(messages, i) for i in self.trained]

    def _alone(self, messages: Sequence[Message], i: int) -> Rendered:
        """One turn behind all that comes before it."""
        marked = self._marked(messages, i + 1) if _MARKS.search(self.template) else None
        return self._tokens(self._prefix(messages, i), [self._span(messages, i)], marked, True, i)

    def _prefix(self, messages: Sequence[Message], i: int) -> str:
        return self._render(messages[: i + 1])

    def _span(self, messages: Sequence[Message], i: int) -> Span:
        """Characters of a turn behind what a template says before the assistant speaks."""
        after = self._prefix(messages, i)
        same = self._spoken_from(messages, i, after)
        if same >= len(after.rstrip()):
            raise DataError(
                f"{self.row.where}: turn {i + 1} of the assistant has nothing behind what the chat template says before it speaks; "
                "set its weight to 0 or choose another template with --chat-template"
            )
        return same, len(after)

    def _spoken_from(self, messages: Sequence[Message], i: int, after: str) -> int:
        """Where in the text that ends with a turn the assistant's own words begin."""
        if not i:  # many templates refuse an empty conversation, and write a header all the same
            return self._header(messages, i, after)
        before = self._render(messages[:i], add_generation_prompt=True)
        same = _same(before, after)
        spoken = self._try(messages[:i])
        if spoken is not None and same < len(spoken.rstrip()):
            raise DataError(
                f"{self.row.where}: the chat template rewrites earlier turns, so the assistant's tokens cannot be told; "
                "use a template with {% generation %} marks or 'prompt' and 'completion' rows"
            )
        if same < len(
            before
        ):  # it does not speak as it is asked to: what it says may begin like the rest of that by chance
            same = min(same, self._header(messages, i, after))
        return same

    def _header(self, messages: Sequence[Message], i: int, after: str) -> int:
        """Where in the text a turn begins to say something of its own, seen from one that says something else."""
        others = (self._try([*messages[:i], {"role": messages[i]["role"], "content": text}]) for text in _OTHERS)
        return min((_same(other, after) for other in others if other is not None), default=len(after))

    def _render(self, messages: Sequence[Message], **more: Any) -> str:
        options = dict(self.row.template_options) | more
        found: str = self.tokenizer.apply_chat_template(
            list(messages), tools=list(self.row.tools) or None, tokenize=False, **options
        )
        return found

    def _marked(self, messages: Sequence[Message], count: int) -> list[bool]:
        """What the template's own marks say of each token."""
        rendered = self.tokenizer.apply_chat_template(
            list(messages[:count]), tools=list(self.row.tools) or None, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True, **dict(self.row.template_options),
        )  # fmt: skip
        return list(map(bool, rendered["assistant_masks"]))

    def _tokens(
        self, text: str, spans: Sequence[Span], marked: Sequence[bool] | None, may_end: bool, speaker: int
    ) -> Rendered:
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{self.row.where}: 'messages' rows need a fast tokenizer (tokenizer.json), which knows where tokens are "
                "in the text; convert it, or use 'prompt' and 'completion' rows"
            )
        ids, places = self._tokenize(text, 0)
        edges = {edge for span in spans for edge in span if any(a < edge < b for a, b in places)}
        if edges and marked is None:
            ids, places = self._split(text, sorted(edges), ids, places)
        # A token that goes over an edge all the same has a part of the turn in it.
        mask = [a < b and any(start < b and a < stop for start, stop in spans) for a, b in places]
        if marked is not None:
            if len(marked) != len(ids):
                raise DataError(f"{self.row.where}: the chat template's marks do not fit its own text")
            mask = [on and its for on, its in zip(mask, marked, strict=True)]
        if not any(mask):
            raise DataError(f"{self.row.where}: the assistant turns are empty after tokenisation")
        last = max(i for i, on in enumerate(mask) if on)
        written = " ".join(str(message.get("content")) for message in self.messages)
        ends = [places[i][0] for i in range(max(0, last - 2), last + 1) if self._ends(ids[i], written)]
        if not may_end or marked is not None or (ends and self._said(text, spans[-1], speaker) <= max(ends)):
            return Rendered(ids, mask, False, self._is_rewritten(text, spans, speaker))
        ids, mask = [*ids[: last + 1], answer_end(self.tokenizer)], [*mask[: last + 1], True]
        return Rendered(ids, mask, True, self._is_rewritten(text, spans, speaker))

    def _is_rewritten(self, text: str, spans: Sequence[Span], speaker: int) -> bool:
        """Whether a learned turn does not stand in its part of a text as it is, but for white space at its end."""
        turns = self.trained if len(spans) == len(self.trained) else [speaker]
        said = [str(self.messages[i].get("content") or "").rstrip() for i in turns]
        # What a template says before the turn may be its beginning ("<think>").
        parts = (text[max(0, start - _OPENING) : stop] for start, stop in spans)
        return any(turn not in part for turn, part in zip(said, parts, strict=True))

    def _said(self, text: str, span: Span, speaker: int) -> int:
        """Where in a turn what the row says ends, seen from turns that say something else: the turn cannot end before."""
        if not str((message := self.messages[speaker]).get("content") or "").strip():
            return 0
        after = text[: span[1]]
        others = (self._try([*self.messages[:speaker], {**message, "content": text}]) for text in _OTHERS)
        alike = [_same(after[::-1], other[::-1]) for other in others if other is not None]
        return max(span[0], len(after) - min(alike)) if alike else 0

    def _tokenize(self, text: str, at: int) -> tuple[list[int], list[Span]]:
        """Tokens of a part of the text that begins at `at`, and where in the text they are."""
        ids, places = token_places(self.tokenizer, text)
        return ids, [(a + at, b + at) for a, b in places]

    def _split(
        self, text: str, edges: Sequence[int], ids: list[int], places: list[Span]
    ) -> tuple[list[int], list[Span]]:
        """Tokens that do not go over the edges of turns: when the model speaks, what comes before is tokenised alone.

        Tokenizers that begin every text with a space would put one in the middle; the text is then left as it is.
        """
        cut = [0, *edges, len(text)]
        parts = [self._tokenize(text[a:b], a) for a, b in itertools.pairwise(cut)]
        split = [token for tokens, _ in parts for token in tokens]
        if self._text(split) != self._text(ids):
            return ids, places
        return split, [place for _, found in parts for place in found]

    def _text(self, ids: Sequence[int]) -> str:
        found: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return found

    def _ends(self, token: int, written: str) -> bool:
        """Whether a token can end a turn: the end of sequence, or one of the template's own special or added tokens."""
        if token == answer_end(self.tokenizer) or token in (getattr(self.tokenizer, "stops", None) or ()):
            return True
        known, name = self.tokenizer.added_tokens_decoder.get(token), self.tokenizer.convert_ids_to_tokens(token)
        # One that is no special token marks parts of a turn: "</tool_call>".
        closes = known is not None and not known.special and name.startswith("</")
        return token in special_ids(self.tokenizer) and not closes and name not in written

    def _check_rendered(self, messages: Sequence[Message]) -> None:
        """Refuses what the template leaves out: it would be trained silently on something else."""
        for i in self.trained:
            message = messages[i]
            if not any(says(message.get(key)) for key in ("content", "tool_calls", *THOUGHTS)):
                raise DataError(
                    f"{self.row.where}: turn {i + 1} of the assistant is empty; remove it or set its weight to 0"
                )
        refuse_left_out(
            self.row.where, messages, self.trained, self._render,
            (self.template, bool(self.row.tools), json.dumps(dict(self.row.template_options), default=str)),
        )  # fmt: skip
        if self.row.tools:
            options = dict(self.row.template_options)
            bare_text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
            if bare_text == self._render(messages):
                raise DataError(
                    f"{self.row.where}: the chat template leaves out 'tools'; choose another with --chat-template, or "
                    "remove the key"
                )

    def _try(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._render(messages)
        except Exception:  # a template may refuse an empty turn
            return None


def _same(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _template_text(row: MessagesRow, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where}: 'messages' rows need a chat template, and the tokenizer has none; give one with --chat-template"
        )
    try:
        text: str = tokenizer.get_chat_template(None, list(row.tools) or None)
    except ValueError as cause:
        names = ", ".join(sorted(tokenizer.chat_template)) if isinstance(tokenizer.chat_template, dict) else ""
        raise SettingsError(
            f"the tokenizer has several chat templates ({names}); choose one with --chat-template"
        ) from cause
    return text
