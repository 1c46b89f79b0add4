"""Rows to token sequences, with the loss on the right tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sculptor.checkpoint.architecture import Kind
from sculptor.data.rows import CompletionRow, MessagesRow, Row, TextRow
from sculptor.errors import DataError, SettingsError

IGNORED = -100  # the label without loss, as in torch and transformers
DEFAULT_MAX_LENGTH = 1024


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


def resolve_max_length(asked: int | None, config: Any) -> int:
    """`--max-length` against what the model can take; by default 1024 or the model's own limit.

    Raises:
        SettingsError: if more is asked for than the model has positions.
    """
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if asked is not None and limit and asked > limit and not hasattr(config, "relative_attention_num_buckets"):
        raise SettingsError(f"--max-length {asked} is more than the {limit} positions of the model")
    return asked or min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)


def encode(rows: Sequence[Row], tokenizer: Any, kind: Kind, max_length: int) -> Encoded:
    """Tokenises rows for a kind of model.

    Long `text` is cut into consecutive windows. Of any other over-long row the middle of the prompt is cut,
    never the completion; a row whose completion does not fit is dropped and counted.

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
    if not examples:
        raise DataError(
            f"{rows[0].where if rows else 'data'}: no row fits into {max_length} tokens; raise --max-length"
        )
    return Encoded(tuple(examples), num_dropped, num_cut)


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
        special = tokenizer.num_special_tokens_to_add()
        ids = tokenizer(row.text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            raise DataError(f"{row.where}: empty after tokenisation")
        windows = [ids[i : i + max_length - special] for i in range(0, len(ids), max_length - special)]
        built = [tokenizer.build_inputs_with_special_tokens(window) for window in windows] if special else windows
        return [Example(tuple(ids), _maskable(ids, tokenizer)) for ids in built]
    ids = tokenizer(row.text, verbose=False).input_ids
    if len(ids) < 2:
        raise DataError(f"{row.where}: empty after tokenisation ({len(ids)} token); the loss needs at least 2")
    windows = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Example(tuple(window), tuple(window)) for window in windows if len(window) > 1]


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
    messages = list(row.messages)
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(rendered["input_ids"]), list(rendered["assistant_masks"])
    else:
        ids, mask = _mask_by_prefix(row, messages, tokenizer)
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
        before, after = render(i, True), render(i + 1, False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                f"{row.where}: the chat template rewrites earlier turns, so the assistant's tokens cannot be told; "
                "use a template with {% generation %} marks or 'prompt' and 'completion' rows"
            )
        mask[len(before) : len(after)] = [1] * (len(after) - len(before))
    return ids, mask
