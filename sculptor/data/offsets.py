"""Where in a text its tokens are, the spaces that some tokenizers leave out of that among them."""

import json
from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]
_SPACE = "\u0120"  # how byte-level vocabularies write one


def token_places(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Ids of a text alone, and the characters that each is read from, (start, stop)."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = list(found["input_ids"]), list(found["offset_mapping"])
    if _trims(_after(tokenizer)):
        places = _with_spaces(tokenizer.convert_ids_to_tokens(ids), places, text)
    return ids, places


def _after(tokenizer: Any) -> Any:
    """What a fast tokenizer does behind its model, as its file has it."""
    processor = getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None)
    return {} if processor is None else json.loads(processor.__getstate__())


def _trims(after: Any) -> bool:
    """Whether that leaves the spaces at the ends of tokens out of their places."""
    if after.get("type") == "Sequence":
        return any(map(_trims, after.get("processors", ())))
    return after.get("type") in ("ByteLevel", "RobertaProcessing") and bool(after.get("trim_offsets"))


def _with_spaces(tokens: Sequence[str], places: Sequence[Span], text: str) -> list[Span]:
    """Places as they were before that; a token of spaces alone was left with its end."""
    found: list[Span] = []
    stop = 0
    for i, (token, (first, last)) in enumerate(zip(tokens, places, strict=True)):
        before = len(token) - len(token.lstrip(_SPACE))
        behind = 0 if before == len(token) else len(token) - len(token.rstrip(_SPACE))
        following = places[i + 1][0] if i + 1 < len(places) else len(text)
        while before and first > stop:  # a space that was put there, and is none of the text, cost a character as well
            first, before = first - 1, before - 1
        while behind and last < following and text[last].isspace():
            last, behind = last + 1, behind - 1
        found.append((first, last))
        stop = max(stop, last)
    return found
