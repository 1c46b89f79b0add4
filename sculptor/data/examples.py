"""Rows to token sequences, with the loss on the right tokens."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sculptor.checkpoint.architecture import ModelKind
from sculptor.data.chat import render_conversation
from sculptor.data.edges import answer_end, completion_ids, is_apart, prompt_ids, sequence_frame, target_ids
from sculptor.data.mixture import Mixture
from sculptor.data.row_types import CompletionRow, LabelledRow, MessagesRow, Row, TextRow, settle
from sculptor.data.rows import DataSource
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
            for masked language modelling the ids that may be masked; for a classifier the number of the class alone.
        token_types: of a pair of texts, which of them a token is of, where the model asks for that; else none.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    token_types: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that a batch has to make room for."""
        return max(len(self.input_ids), len(self.labels))


@dataclass(frozen=True, slots=True)
class Encoded:
    """All examples, in the order of their rows.

    Attributes:
        num_dropped: rows, or turns with a sequence of their own, that did not fit; `num_cut` lost a part of their prompt,
            `num_ended` were given an end of sequence, and of `num_rewritten` the chat template says what is learned in other words.
        mixture: shares of the data they come from; None if the data are simply put together.
    """

    examples: tuple[Example, ...]
    num_dropped: int
    num_cut: int
    num_ended: int = 0
    mixture: Mixture | None = None
    num_rewritten: int = 0

    @property
    def num_epoch(self) -> int:
        """Examples of an epoch."""
        return len(self.examples) if self.mixture is None else self.mixture.num_epoch

    def of_an_epoch(self, seed: int) -> tuple[Example, ...]:
        """Those of the first epoch, in the order of their rows."""
        if self.mixture is None:
            return self.examples
        return tuple(self.examples[i] for i in sorted(self.mixture.rows(0, seed)))

    def says(self, name: str) -> str | None:
        """A line on rows of some data that did not fit; None if all did."""
        if not self.num_dropped and not self.num_cut:
            return None
        dropped = f"{self.num_dropped:,} rows or turns dropped (completion too long)"
        return f"{name}: {dropped}, {self.num_cut:,} with the middle of the prompt cut"


def digest_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over all ids and labels, to tell whether data are still the same."""
    found = hashlib.sha256()
    for example in examples:
        found.update(array("q", [*example.input_ids, -1, *example.labels, -2]).tobytes())
        if example.token_types:
            found.update(array("q", [*example.token_types, -3]).tobytes())
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


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """What became of one row.

    Attributes:
        examples: its sequences; none, if its completion does not fit.
        dropped: sequences that it would have had, but for a completion that does not fit.
        cut: the middle of its prompt was left out.
        ended: an end of sequence was added to what the chat template made.
        apart: prompt and completion, joined, would be tokenised in another way at their edge.
        rewritten: the chat template says what is learned in other words.
    """

    examples: tuple[Example, ...]
    dropped: int = 0
    cut: bool = False
    ended: bool = False
    apart: bool = False
    rewritten: bool = False


def encode(
    rows: Sequence[Row], tokenizer: Any, kind: ModelKind, max_length: int, vocab_size: int | None = None
) -> Encoded:
    """Tokenises rows for a kind of model.

    Long `text` is cut into consecutive windows, each behind the tokenizer's own start of a sequence. Of any other over-long
    row the middle of the prompt is cut, never the completion; a row whose completion does not fit is dropped and counted.
    `vocab_size`, if given, is how many ids the model has.

    Raises:
        DataError: with file and line number, for a row that is empty after tokenisation or does not suit the
            model; if no row is left.
    """
    found = [encode_row(row, tokenizer, kind, max_length, vocab_size) for row in rows]
    examples = [example for row in found for example in row.examples]
    if not examples:
        raise DataError(
            f"{rows[0].where if rows else 'data'}: no row fits into {max_length} tokens; raise --max-length"
        )
    return Encoded(
        tuple(examples),
        num_dropped=sum(row.dropped for row in found),
        num_cut=sum(row.cut for row in found),
        num_ended=sum(row.ended for row in found),
        num_rewritten=sum(row.rewritten for row in found),
    )


def encode_sources(
    sources: Sequence[DataSource], tokenizer: Any, kind: ModelKind, max_length: int, vocab_size: int | None = None
) -> Encoded:
    """As `encode`, of several data, with the shares that their weights give them.

    Raises:
        DataError: as `encode`.
    """
    if all(source.weight is None for source in sources):
        return encode([row for source in sources for row in source.rows], tokenizer, kind, max_length, vocab_size)
    parts = [encode(source.rows, tokenizer, kind, max_length, vocab_size) for source in sources]
    return Encoded(
        tuple(example for part in parts for example in part.examples),
        sum(part.num_dropped for part in parts),
        sum(part.num_cut for part in parts),
        sum(part.num_ended for part in parts),
        mixture_of(sources, [len(part.examples) for part in parts]),
        sum(part.num_rewritten for part in parts),
    )


def mixture_of(sources: Sequence[DataSource], sizes: Sequence[int]) -> Mixture | None:
    """The shares that weights give data of some numbers of examples; None without weights."""
    weights = tuple(source.weight for source in sources if source.weight is not None)
    return Mixture(tuple(sizes), weights) if weights else None


def encode_row(row: Row, tokenizer: Any, kind: ModelKind, max_length: int, vocab_size: int | None = None) -> EncodedRow:
    """Tokenises one row; as `encode`.

    Raises:
        DataError: with file and line number.
    """
    row = settle(row, bool(tokenizer.chat_template) and kind == "causal")
    if kind == "classifier":
        found = _encode_labelled(row, tokenizer, max_length)
        _check_vocabulary(row.where, [Example(example.input_ids, ()) for example in found.examples], vocab_size)
        return found
    if isinstance(row, TextRow):
        found = EncodedRow(tuple(_encode_text(row, tokenizer, kind, max_length)))
    elif kind == "masked":
        raise DataError(f"{row.where}: an encoder-only model trains on 'text' rows")
    elif kind == "seq2seq":
        found = _encode_pair(row, tokenizer, max_length)
    elif isinstance(row, CompletionRow):
        found = _encode_completion(row, tokenizer, max_length)
    else:
        assert isinstance(row, MessagesRow)
        found = _encode_messages(row, tokenizer, max_length)
    _check_vocabulary(row.where, found.examples, vocab_size)
    if not isinstance(row, TextRow):
        _check_known(row.where, found.examples, tokenizer)
    return found


def _check_vocabulary(where: str, examples: Sequence[Example], vocab_size: int | None) -> None:
    largest = max((max((*example.input_ids, *example.labels)) for example in examples), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(f"{where}: {no_embedding(largest, vocab_size)}")


def no_embedding(token: int, vocab_size: int) -> str:
    """What is wrong with a token beyond the embeddings, and what to do."""
    return (
        f"the tokenizer gives id {token}, the model has {vocab_size} embeddings; resize them or use its own tokenizer"
    )


def _check_known(where: str, examples: Sequence[Example], tokenizer: Any) -> None:
    """Refuses answers of which a tokenizer knows nothing: the model would learn to say so."""
    for example in examples:
        learned = {label for label in example.labels if label != IGNORED} - {answer_end(tokenizer)}
        if learned == {tokenizer.unk_token_id}:
            raise DataError(
                f"{where}: the tokenizer knows nothing of what is to be learned: all of it is {tokenizer.unk_token}"
            )


def cut_middle(ids: list[int], budget: int) -> list[int]:
    """The first and last tokens of a prompt, `budget` of them in all."""
    if len(ids) <= budget:
        return ids
    head = budget // 2
    return ids[:head] + ids[len(ids) - (budget - head) :]


def _encode_text(row: TextRow, tokenizer: Any, kind: ModelKind, max_length: int) -> list[Example]:
    if kind == "seq2seq":
        raise DataError(f"{row.where}: an encoder-decoder model trains on 'prompt' and 'completion' rows")
    if kind == "masked":
        return _encode_masked(row, tokenizer, max_length)
    prefix, bare, suffix = sequence_frame(tokenizer, row.text)
    ids = [*bare, *suffix]
    if not bare or len(prefix) + len(ids) < 2:
        raise DataError(f"{row.where}: empty after tokenisation ({len(bare)} tokens); the loss needs at least 2")
    size = max_length - len(prefix)
    windows = [(*prefix, *ids[i : i + size]) for i in range(0, len(ids), size)]
    examples = [Example(window, window) for window in windows if len(window) > 1]
    if len(windows[-1]) == 1:  # nothing would predict a last token by itself
        examples.append(Example((windows[-2][-1], *windows[-1]), (IGNORED, *windows[-1])))
    return examples


def _encode_masked(row: TextRow, tokenizer: Any, max_length: int) -> list[Example]:
    """Windows of a text, each between the tokenizer's own special tokens."""
    prefix, bare, suffix = sequence_frame(tokenizer, row.text)
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


def _encode_labelled(row: Row, tokenizer: Any, max_length: int) -> EncodedRow:
    """As the tokenizer has texts and pairs; over-long ones are cut as it cuts them."""
    if not isinstance(row, LabelledRow):
        raise DataError(f"{row.where}: a classifier trains on 'text' and 'label' rows")
    texts = [text for text in (row.text, row.pair) if text is not None]
    found = tokenizer(*texts, verbose=False)
    cut = len(found.input_ids) > max_length
    if cut:
        found = tokenizer(*texts, truncation=True, max_length=max_length)
    if not all(tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts):
        raise DataError(f"{row.where}: empty after tokenisation")
    types = found.get("token_type_ids") or ()
    label = IGNORED if row.index is None else row.index
    return EncodedRow((Example(tuple(found.input_ids), (label,), tuple(types) if any(types) else ()),), cut=cut)


def _encode_pair(row: Row, tokenizer: Any, max_length: int) -> EncodedRow:
    """Prompt to the encoder, completion to the decoder."""
    if not isinstance(row, CompletionRow):
        raise DataError(f"{row.where}: an encoder-decoder model trains on 'prompt' and 'completion' rows")
    source = tokenizer(row.prompt, verbose=False).input_ids
    target = target_ids(tokenizer, row.completion)
    if not source or not tokenizer(row.completion, add_special_tokens=False, verbose=False).input_ids:
        raise DataError(f"{row.where}: empty after tokenisation")
    if len(target) > max_length:
        return EncodedRow((), 1)
    example = Example(tuple(cut_middle(source, max_length)), tuple(target))
    return EncodedRow((example,), cut=len(source) > max_length)


def _encode_completion(row: CompletionRow, tokenizer: Any, max_length: int) -> EncodedRow:
    prompt, completion = prompt_ids(tokenizer, row.prompt), completion_ids(tokenizer, row.completion)
    if len(completion) < 2:
        raise DataError(f"{row.where}: completion is empty after tokenisation")
    if not prompt:
        raise DataError(
            f"{row.where}: prompt is empty after tokenisation; nothing would predict the completion's start"
        )
    apart = is_apart(tokenizer, row.prompt + row.completion, prompt + completion)
    example, cut = _fit(prompt + completion, [False] * len(prompt) + [True] * len(completion), max_length)
    return EncodedRow((example,) if example else (), int(example is None), cut, apart=apart)


def _encode_messages(row: MessagesRow, tokenizer: Any, max_length: int) -> EncodedRow:
    rendered = render_conversation(row, tokenizer)
    fitted = [_fit(each.ids, each.mask, max_length) for each in rendered]
    examples = tuple(example for example, _ in fitted if example is not None)
    ended, rewritten = (any(getattr(each, name) for each in rendered) for name in ("ended", "rewritten"))
    return EncodedRow(examples, len(fitted) - len(examples), any(cut for _, cut in fitted), ended, rewritten=rewritten)


def _fit(ids: Sequence[int], mask: Sequence[bool], max_length: int) -> tuple[Example | None, bool]:
    """A sequence with the middle of what comes before the loss cut out, if it is too long; None if that is not enough."""
    start = next(i for i, on in enumerate(mask) if on)
    labels = [token if on else IGNORED for token, on in zip(ids, mask, strict=True)]
    budget = max_length - (len(ids) - start)
    if budget < min(start, 1):
        return None, False
    prompt = cut_middle(list(ids[:start]), budget)
    return Example((*prompt, *ids[start:]), (*[IGNORED] * len(prompt), *labels[start:])), start > budget
