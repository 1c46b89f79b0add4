"""What rows say, whatever they were read from."""

import hashlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text; the loss is on all of it."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt and what should follow it; the loss is on the completion and the end of sequence.

    Attributes:
        where: file and line.
        prompt: what the model reads.
        completion: what it learns to say.
        choices: answers that evaluation ranks; `completion` is one of them.
        references: answers that are as right as the completion.
    """

    where: str
    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MessagesRow:
    """A conversation; the loss is on the assistant's turns, unless one says otherwise.

    Attributes:
        where: file and line.
        messages: as a chat template takes them.
        trained: per message, whether the loss is on it.
        tools: definitions that go to the template.
        template_options: further arguments of the template, in pairs.
        plain: the same as prompt and completion, for a model without a chat template; None if only one has a use for it.
        references: answers that are as right as the last turn.
    """

    where: str
    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[Any, ...] = ()
    template_options: tuple[tuple[str, Any], ...] = ()
    plain: tuple[str, str] | None = None
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A text, or two, and which class it is of.

    Attributes:
        where: file and line.
        text: what is classified.
        pair: what the text is compared with; None for texts by themselves.
        label: name of the class; None where nobody needs it.
        index: number of the class among a model's; None as long as these are not known.
    """

    where: str
    text: str
    pair: str | None
    label: str | None
    index: int | None = None


Row = TextRow | CompletionRow | MessagesRow | LabelledRow


def settle(row: Row, talks: bool) -> Row:
    """A row as a model takes it: an instruction is a conversation only for one that talks through a chat template."""
    if isinstance(row, MessagesRow) and row.plain is not None and not talks:
        return CompletionRow(row.where, *row.plain, references=row.references)
    return row


def digest_rows(rows: Iterable[Row]) -> str:
    """SHA-256 over what rows say, wherever they were read from."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr((type(row).__name__, astuple(row)[1:])).encode())
    return found.hexdigest()
