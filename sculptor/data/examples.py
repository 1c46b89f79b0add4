"""Rows to token sequences, with the loss on the right tokens."""

import hashlib
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sculptor.checkpoint.architecture import Kind
from sculptor.data.rows import CompletionRow, MessagesRow, Row, TextRow
from sculptor.errors import DataError, SettingsError

IGNORED = -100  # the label without loss, as in torch and transformers
DEFAULT_MAX_LENGTH = 1024
MIN_MAX_LENGTH = 8


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        input_ids: what the model (or its encoder) reads.
        labels: per token of `input_ids` its own id or IGNORED; for an encoder-decoder the decoder's targets;
            for masked language modelling the ids that may be masked.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens that a batch has to make room for."""
        return max(len(self.input_ids), len(self.labels))


@dataclass(frozen=True, slots=True)
class Encoded:
    """All examples, and what did not fit."""

    examples: tuple[Example, ...]
    num_dropped: int
    num_cut: int

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for example in self.examples for label in example.labels)


def digest_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over all ids and labels, to tell whether data are still the same."""
    found = hashlib.sha256()
    for example in examples:
        found.update(array("q", [*example.input_ids, -1, *example.labels, -2]).tobytes())
    return found.hexdigest()


def resolve_max_length(asked: int | None, max_positions: int | None) -> int:
    """`--max-length` against what the model can take; by default 1024 or the model's own limit.

    Raises:
        SettingsError: if more is asked for than the model has positions, or too little to be of use.
    """
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, max_positions or DEFAULT_MAX_LENGTH)
    if asked < MIN_MAX_LENGTH:
        raise SettingsError(f"--max-length {asked}: expected at least {MIN_MAX_LENGTH}")
    if max_positions is not None and asked > max_positions:
        raise SettingsError(f"--max-length {asked} is more than the {max_positions} positions of the model")
    return asked


def encode(rows: Sequence[Row], tokenizer: Any, kind: Kind, max_length: int, vocab_size: int | None = None) -> Encoded:
    """Tokenises rows for a kind of model.

    Long `text` is cut into consecutive windows. Of any other over-long row the middle of the prompt is cut,
    never the completion; a row whose completion does not fit is dropped and counted. `vocab_size`, if given, is
    how many ids the model has.

    Raises:
        DataError: with file and line number, for a row that is empty after tokenisation or does not suit the
            model; if no row is left.
    """
    examples: list[Example] = []
    num_dropped = num_cut = 0
    for row in rows:
        fitted: list[Example] | None
        if isinstance(row, TextRow):
            fitted, cut = _encode_text(row, tokenizer, kind, max_length), False
        elif kind == "masked":
            raise DataError(f"{row.where}: an encoder-only model trains on 'text' rows")
        elif kind == "seq2seq":
            fitted, cut = _encode_pair(row, tokenizer, max_length)
        else:
            fitted, cut = _encode_supervised(row, tokenizer, max_length)
        num_dropped += fitted is None
        num_cut += cut
        examples += fitted or []
    _check_vocabulary(examples, vocab_size)
    if not examples:
        raise DataError(
            f"{rows[0].where if rows else 'data'}: no row fits into {max_length} tokens; raise --max-length"
        )
    return Encoded(tuple(examples), num_dropped, num_cut)


def _check_vocabulary(examples: Sequence[Example], vocab_size: int | None) -> None:
    largest = max((max(*example.input_ids, *example.labels) for example in examples), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives id {largest}, the model has {vocab_size} embeddings; resize them or use its own tokenizer"
        )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's ids with the tokenizer's own leading special tokens and no end of sequence."""
    ids: list[int] = tokenizer(prompt).input_ids
    while (
        ids
        and ids[-1] == tokenizer.eos_token_id
        and ids[-1:] != tokenizer(prompt, add_special_tokens=False).input_ids[-1:]
    ):
        ids = ids[:-1]
    return ids


def completion_ids(tokenizer: Any, completion: str) -> list[int]:
    """A completion's ids with the end of sequence behind them."""
    ids: list[int] = tokenizer(completion, add_special_tokens=False).input_ids
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def cut_middle(ids: list[int], budget: int) -> list[int]:
    """The first and last tokens of a prompt, `budget` of them in all."""
    if len(ids) <= budget:
        return ids
    head = budget // 2
    return ids[:head] + ids[len(ids) - (budget - head) :]


def _encode_text(row: TextRow, tokenizer: Any, kind: Kind, max_length: int) -> list[Example]:
    if kind == "seq2seq":
        raise DataError(f"{row.where}: an encoder-decoder model trains on 'prompt' and 'completion' rows")
    if kind == "masked":
        return _encode_masked(row, tokenizer, max_length)
    ids = tokenizer(row.text, verbose=False).input_ids
    bare = tokenizer(row.text, add_special_tokens=False, verbose=False).input_ids
    if not bare or len(ids) < 2:
        raise DataError(f"{row.where}: empty after tokenisation ({len(bare)} tokens); the loss needs at least 2")
    windows = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Example(tuple(window), tuple(window)) for window in windows if len(window) > 1]


def _encode_masked(row: TextRow, tokenizer: Any, max_length: int) -> list[Example]:
    """Windows of a text, each between the tokenizer's own special tokens."""
    bare = tokenizer(row.text, add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer(row.text, verbose=False).input_ids
    start = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    prefix, suffix = whole[:start], whole[start + len(bare) :]
    size = max_length - len(prefix) - len(suffix)
    examples = []
    for i in range(0, len(bare), size):
        ids = [*prefix, *bare[i : i + size], *suffix]
        examples.append(Example(tuple(ids), _maskable(ids, tokenizer)))
    examples = [example for example in examples if set(example.labels) != {IGNORED}]
    if not examples:
        raise DataError(f"{row.where}: empty after tokenisation: no token that could be masked")
    return examples


def _maskable(ids: list[int], tokenizer: Any) -> tuple[int, ...]:
    special = set(tokenizer.all_special_ids)
    return tuple(IGNORED if token in special else token for token in ids)


def _encode_pair(row: Row, tokenizer: Any, max_length: int) -> tuple[list[Example] | None, bool]:
    """Prompt to the encoder, completion to the decoder."""
    if not isinstance(row, CompletionRow):
        raise DataError(f"{row.where}: an encoder-decoder model trains on 'prompt' and 'completion' rows")
    source = tokenizer(row.prompt).input_ids
    target = completion_ids(tokenizer, row.completion)
    if not source or len(target) < 2:
        raise DataError(f"{row.where}: empty after tokenisation")
    if len(target) > max_length:
        return None, False
    return [Example(tuple(cut_middle(source, max_length)), tuple(target))], len(source) > max_length


def _encode_supervised(row: Row, tokenizer: Any, max_length: int) -> tuple[list[Example] | None, bool]:
    if isinstance(row, CompletionRow):
        prompt, completion = prompt_ids(tokenizer, row.prompt), completion_ids(tokenizer, row.completion)
        if len(completion) < 2:
            raise DataError(f"{row.where}: completion is empty after tokenisation")
        ids, labels = prompt + completion, [IGNORED] * len(prompt) + completion
    else:
        assert isinstance(row, MessagesRow)
        ids, labels = _encode_messages(row, tokenizer)
    start = next(i for i, label in enumerate(labels) if label != IGNORED)
    budget = max_length - (len(ids) - start)
    if budget < min(start, 1):
        return None, False
    prompt = cut_middle(ids[:start], budget)
    return [Example(tuple(prompt + ids[start:]), (IGNORED,) * len(prompt) + tuple(labels[start:]))], start > budget


def _encode_messages(row: MessagesRow, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A rendered conversation and its labels: by the template's generation marks, else by prefix difference."""
    if not tokenizer.chat_template:
        raise DataError(f"{row.where}: 'messages' rows need a chat template, and the tokenizer has none")
    from jinja2 import TemplateError

    messages = list(row.messages)
    try:
        if re.search(r"\{%-?\s*generation\b", tokenizer.chat_template):
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = list(rendered["input_ids"]), list(rendered["assistant_masks"])
        else:
            ids, mask = _mask_by_prefix(row, messages, tokenizer)
    except DataError:
        raise
    except (TemplateError, ValueError, TypeError) as cause:
        raise DataError(f"{row.where}: the chat template does not take these messages ({cause})") from cause
    if not any(mask):
        raise DataError(f"{row.where}: the assistant turns are empty after tokenisation")
    return ids, [token if on else IGNORED for token, on in zip(ids, mask, strict=True)]


def _mask_by_prefix(row: MessagesRow, messages: list[Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    def render(count: int, generation_prompt: bool) -> list[int]:
        rendered = tokenizer.apply_chat_template(
            messages[:count], tokenize=True, return_dict=True, add_generation_prompt=generation_prompt
        )
        return list(rendered["input_ids"])

    ids = render(len(messages), False)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Many templates refuse an empty conversation; nothing stands before a first turn of the assistant.
        before, after = render(i, True) if i else [], render(i + 1, False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                f"{row.where}: the chat template rewrites earlier turns, so the assistant's tokens cannot be told; "
                "use a template with {% generation %} marks or 'prompt' and 'completion' rows"
            )
        mask[len(before) : len(after)] = [1] * (len(after) - len(before))
    return ids, mask
