"""Tokens at the edges of texts: what stands before and behind a sequence, and between a prompt and what follows it."""

import functools
from typing import Any


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


def completion_ids(tokenizer: Any, completion: str) -> list[int]:
    """A completion's ids as they stand behind other text, with the end of sequence behind them."""
    ids = _inner_ids(tokenizer, completion)
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


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
