"""New tokens of a training: read, put into the tokenizer, and a base that has rows for them."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sculptor.checkpoint.old_text import measure_reread
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.checkpoint.staging import writing
from sculptor.checkpoint.vocabulary import FLAGS, Growth, plan_growth, write_grown
from sculptor.checkpoint.written import remove
from sculptor.data.examples import Example
from sculptor.data.reference import TEXT_ENDINGS
from sculptor.errors import DataError, SettingsError
from sculptor.model.samples import Samples
from sculptor.progress import Progress

GROWN_NAME = "grown"


def read_tokens(given: tuple[str, ...]) -> list[str]:
    """Tokens as they are, and those of files, one a line.

    Raises:
        DataError: if a file is no text.
    """
    found = []
    for item in given:
        if not os.path.isfile(item):
            if item.lower().endswith(TEXT_ENDINGS):
                raise DataError(
                    f"--add-tokens {item}: no such file; a token with such an ending has to come from a file"
                )
            found.append(item)
            continue
        found += _read_lines(item)
    return found


def _read_lines(file: str) -> list[str]:
    """What is not blank; what an editor leaves at an end of a line would be a part of a token."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise DataError(f"--add-tokens {file}: no text file in UTF-8 ({cause})") from cause
    found = {i: line for i, line in enumerate(lines, start=1) if line.strip()}
    for i, line in found.items():
        if line != line.rstrip():
            raise DataError(
                f"--add-tokens {file}, line {i}: {line[:60]!r} has white space at its end, where text will not; remove it"
            )
    if not found:
        raise DataError(f"--add-tokens {file}: the file holds no token; expected one a line")
    return list(found.values())


def grow_tokenizer(tokenizer: Any, checkpoint: Checkpoint, given: tuple[str, ...]) -> Growth | None:
    """Adds tokens to a loaded tokenizer, in place, and says what they make of the checkpoint; None without any.

    Raises:
        SettingsError: if the model cannot get them, or the tokenizer does not take them as its file would.
    """
    if not given:
        return None
    from tokenizers import AddedToken

    tokens = read_tokens(given)
    growth = plan_growth(checkpoint, tokens)
    tokenizer.add_tokens([AddedToken(token, **FLAGS) for token in tokens])
    _check(tokenizer, checkpoint, growth)
    return growth


def _check(tokenizer: Any, checkpoint: Checkpoint, growth: Growth) -> None:
    """Looks whether each new token is one in the text, under its id."""
    for i, token in enumerate(growth.tokens):
        found = tokenizer.encode(token, add_special_tokens=False)
        if growth.start + i not in found or tokenizer.convert_tokens_to_ids(token) != growth.start + i:
            raise SettingsError(
                f"--add-tokens {token!r}: {type(tokenizer).__name__} of {checkpoint.path} makes {found} of it, expected "
                f"{growth.start + i}; save the tokenizer with transformers first, or choose another token"
            )


def check_old_text(
    checkpoint: Checkpoint, growth: Growth, samples: Samples | None, wanted: bool, notice: Callable[[str], object]
) -> None:
    """Refuses tokens that change how old text is read, unless they are wanted: then it is told.

    Raises:
        SettingsError: naming them, and how much they change.
    """
    found = measure_reread(checkpoint.path, growth, () if samples is None else texts_of(samples))
    if not found.lines:
        return
    more = [f"and {len(found.lines) - 3} more"] if len(found.lines) > 3 else []
    told = "; ".join(["; ".join(found.lines[:3]), *more, *filter(None, [found.summary])])
    if not wanted:
        raise SettingsError(
            f"--add-tokens: {told}; choose what old text does not have, like '<name>', or pass --common-tokens"
        )
    notice(f"--add-tokens: {told}")


def texts_of(samples: Samples) -> Iterator[tuple[int, ...]]:
    """Their tokens."""
    return (sample.example.input_ids for sample in samples.all)


def tell_unseen(growth: Growth | None, examples: Iterable[Example], notice: Callable[[str], object]) -> None:
    """Says which new tokens, if there are any, stand in no row: a head learns that they are not said, and that is all."""
    if growth is None:
        return
    seen = {token for example in examples for token in (*example.input_ids, *example.labels)}
    unseen = [token for i, token in enumerate(growth.tokens) if growth.start + i not in seen]
    if unseen:
        more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
        listed = ", ".join(map(repr, unseen[:8])) + more
        notice(f"--add-tokens: no row has {listed}: nothing is learned of them but that they are not said")


def write_grown_base(checkpoint: Checkpoint, growth: Growth, partial: Path, progress: Progress) -> None:
    """Writes the base with new tokens into a staging directory, over what an earlier run left."""
    path = partial / GROWN_NAME
    with writing(path):
        remove(path)
        path.mkdir(exist_ok=True)
    with closing(progress(total=checkpoint.num_bytes, desc="add tokens", unit="B")) as bar:
        write_grown(checkpoint, path, growth, bar)


def open_grown(checkpoint: Checkpoint, growth: Growth, partial: Path) -> Checkpoint:
    """What `write_grown_base` wrote, looked at as a user's transformers would.

    Raises:
        SettingsError: if its tokenizer does not know the new tokens.
    """
    from transformers import AutoTokenizer

    grown = open_checkpoint(partial / GROWN_NAME)
    _check(AutoTokenizer.from_pretrained(grown.path, local_files_only=True), checkpoint, growth)
    return grown
