"""Tokens at the edges of texts: what stands before and behind a sequence, and between a prompt and what follows it."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any

from sculptor.data.row_types import CompletionRow, Row

NO_TOKEN = -1  # no token's id


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's ids with the tokenizer's own leading special tokens, once each, and no end of sequence."""
    prefix, bare, _ = sequence_frame(tokenizer, prompt)
    return [*prefix, *bare]


def sequence_frame(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer puts before a text, the text's own ids, and what it puts behind."""
    bare = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    whole = tokenizer(text, verbose=False).input_ids
    if not bare:
        count = int(whole[:1] == [tokenizer.bos_token_id])
        return whole[:count], [], whole[count:]
    start = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
    if start is None:  # it puts something into the text itself
        return [], whole, []
    prefix, suffix = whole[:start], whole[start + len(bare) :]
    if prefix and bare[: len(prefix)] == prefix:  # written in the text already
        bare = bare[len(prefix) :]
    return prefix, bare, suffix


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Special and added tokens: what a template can write that is no text."""
    return _special_ids(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """`size` is the tokenizer's: it may be given tokens after it was looked at."""
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special or token.content.strip())
    return frozenset(itertools.chain(tokenizer.all_special_ids, added))


def end_answers_at(tokenizer: Any, stops: Collection[int]) -> None:
    """Has answers end where generation stops, if it does not stop at the tokenizer's end of sequence.

    A model that is taught to end with a token that `generate` reads over would go on behind every answer.

    Args:
        tokenizer: whose `answer_end` it becomes; it renders and writes as before.
        stops: ids at which generation stops, the most usual first; what is no special token, or the unknown one, is none.
    """
    tokenizer.stops = frozenset(stops)
    special = [token for token in stops if token in special_ids(tokenizer) - {tokenizer.unk_token_id}]
    if special and tokenizer.eos_token_id not in special:
        tokenizer.answer_end_id = special[0]


def answer_end(tokenizer: Any) -> int:
    """The token that ends an answer; `NO_TOKEN` where nothing is generated, and the tokenizer has none, as BERT's."""
    found = getattr(tokenizer, "answer_end_id", tokenizer.eos_token_id)
    return NO_TOKEN if found is None else int(found)


def tell_other_end(rows: Iterable[Row], tokenizer: Any, notice: Callable[[str], object]) -> None:
    """Tells, in one line, of a tokenizer whose end of sequence does not end answers, if there are any."""
    if answer_end(tokenizer) not in (tokenizer.eos_token_id, NO_TOKEN) and any(
        isinstance(row, CompletionRow) for row in rows
    ):
        written = tokenizer.convert_ids_to_tokens(answer_end(tokenizer))
        notice(
            f"answers end with {written}, where generation stops, and not with the tokenizer's own end of sequence, "
            f"{tokenizer.eos_token}, where it does not"
        )


def completion_ids(tokenizer: Any, completion: str) -> list[int]:
    """A completion's ids as they stand behind other text, with the end of an answer behind them."""
    ids, end = _inner_ids(tokenizer, completion), answer_end(tokenizer)
    return ids if ids[-1:] == [end] else [*ids, end]


# Texts behind which a tokenizer begins a new word without a space of its own; one of them is a token by itself.
_LEADS = ("\n", ":", ">", "=")


def _inner_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that is not at the start: some tokenizers put a space before everything they read."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids or not _adds_space(tokenizer):
        return ids
    for lead in _LEADS:
        before = tokenizer(lead, add_special_tokens=False, verbose=False).input_ids
        joined: list[int] = tokenizer(lead + text, add_special_tokens=False, verbose=False).input_ids
        if before and joined[: len(before)] == before and len(joined) > len(before):
            return joined[len(before) :]
    return ids


@functools.lru_cache(maxsize=8)
def _adds_space(tokenizer: Any) -> bool:
    """Whether a text without one begins with a space in SentencePiece's or GPT-2's writing."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False, verbose=False).input_ids[:1])
    return bool(first) and str(first[0])[:1] in ("\u2581", "\u0120")


def is_apart(tokenizer: Any, text: str, ids: list[int]) -> bool:
    """Whether prompt and completion, joined, would be tokenised in another way than one behind the other."""
    joined = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return joined not in (ids[-len(joined) :], ids[-len(joined) - 1 : -1])


def target_ids(tokenizer: Any, completion: str) -> list[int]:
    """What a decoder that reads no prompt is to say: as the tokenizer writes targets, with their start or language."""
    ids: list[int] = tokenizer(text_target=completion, verbose=False).input_ids
    return ids if tokenizer.eos_token_id in ids else [*ids, tokenizer.eos_token_id]


@functools.lru_cache(maxsize=8)
def target_start(tokenizer: Any) -> tuple[int, ...]:
    """What targets have before their text: a language, for some."""
    first, second = (target_ids(tokenizer, text) for text in ("a", "1"))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    special = special_ids(tokenizer) - {tokenizer.eos_token_id}
    return tuple(itertools.takewhile(special.__contains__, (token for token, _ in same)))


def tell_language(rows: Iterable[Row], tokenizer: Any, notice: Callable[[str], object]) -> None:
    """Tells, in one line, that targets are written in the language of prompts, where a tokenizer names no other."""
    source, target = (getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang"))
    if isinstance(source, str) and target in (None, source) and any(isinstance(row, CompletionRow) for row in rows):
        notice(
            f"completions are written as targets in {source}, the language of the prompts, since the model's tokenizer names no "
            "other; for another, save it with tgt_lang= beside the model"
        )
