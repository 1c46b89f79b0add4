"""What new tokens do to text that was there before them: where one stands in it, it is read in another way.

A new token stands for its characters wherever they are, so one that is a frequent word, or a part of words, changes what the
model has read all its life. Three things tell without any data of the user's: what the older tokens of the vocabulary stand
for, the chat template, and text that the model says by itself.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculptor.checkpoint.folders import TEMPLATES
from sculptor.checkpoint.vocabulary import Growth, open_tokenizer, token_entries
from sculptor.errors import CheckpointError
from sculptor.validation import parse, read_file

_MEND = "mend the file"
_BETWEEN = "\n\0\n"  # stands in no token
_SPACES = str.maketrans({"\u2581": " ", "\u0120": " "})  # how vocabularies write a space


@dataclass(frozen=True, slots=True)
class Reread:
    """How old text is read otherwise.

    Attributes:
        inside: new token -> an older one that it is a part of.
        in_template: new tokens that stand in a chat template of the base: every conversation is read through them.
        times: new token -> how often it stands in the samples, of those that do.
        num_tokens: of the samples, and `num_replaced`, those of them that are others now.
    """

    inside: Mapping[str, str]
    in_template: Sequence[str]
    times: Mapping[str, int]
    num_tokens: int
    num_replaced: int

    @property
    def share(self) -> float:
        """Of the samples' tokens, those that are others now."""
        return self.num_replaced / max(1, self.num_tokens)

    @property
    def lines(self) -> list[str]:
        """What there is to say of each token that is in the way."""
        found = {
            token: f"{token!r} is a part of {old!r}, which the tokenizer has" for token, old in self.inside.items()
        }
        for token in self.in_template:
            _add(found, token, "stands in the base's chat template")
        for token, times in self.times.items():
            _add(found, token, f"stands {times:,} times in what the base says by itself")
        return list(found.values())

    @property
    def summary(self) -> str:
        """How much of the samples it is; empty without any."""
        return (
            f"{100 * self.share:.2g} % of the tokens of the archive's samples are read otherwise" if self.share else ""
        )


def measure_reread(base: Path, growth: Growth, samples: Iterable[Sequence[int]]) -> Reread:
    """Compares how a tokenizer reads with and without new tokens.

    Args:
        base: directory with the tokenizer as it was.
        growth: its new tokens.
        samples: token ids of what the model says by itself.

    Raises:
        CheckpointError: if the tokenizer cannot be read.
    """
    before, after = open_tokenizer(base), open_tokenizer(base)
    after.add_tokens(list(map(_token, token_entries(growth))))
    times = dict.fromkeys(growth.tokens, 0)
    num_tokens = num_replaced = 0
    for ids in samples:
        text = before.decode(list(ids), skip_special_tokens=False)
        old, new = (each.encode(text, add_special_tokens=False).ids for each in (before, after))
        found = [i - growth.start for i in new if growth.start <= i < growth.stop]
        for i in found:
            times[growth.tokens[i]] += 1
        num_tokens += len(old)
        num_replaced += len(old) - (len(new) - len(found)) if found else 0
    standing = {token: count for token, count in times.items() if count}
    written = "\n".join(_templates(base))
    in_template = [token for token in growth.tokens if token in written]
    return Reread(_inside(before, growth), in_template, standing, num_tokens, max(0, num_replaced))


def _add(found: dict[str, str], token: str, said: str) -> None:
    found[token] = f"{found[token]}, and {said}" if token in found else f"{token!r} {said}"


def _templates(base: Path) -> Iterator[str]:
    """What a tokenizer's chat templates say, wherever they are kept."""
    for file in sorted([*base.glob("*.jinja"), *base.glob(f"{TEMPLATES}/*.jinja")]):
        yield read_file(file, CheckpointError, _MEND).decode("utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (base / name).is_file():
            yield from _texts(
                parse(read_file(base / name, CheckpointError, _MEND), base / name, CheckpointError, _MEND)
            )


def _texts(content: Mapping[str, Any]) -> Iterator[str]:
    """One template, or a list of named ones."""
    given = content.get("chat_template")
    for each in given if isinstance(given, list) else [given]:
        text = each.get("template") if isinstance(each, dict) else each
        if isinstance(text, str):
            yield text


def _inside(tokenizer: Any, growth: Growth) -> dict[str, str]:
    """New token -> an older one whose text it is a part of."""
    ids = range(growth.start)
    names = [tokenizer.id_to_token(i) or "" for i in ids]
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    known = [part for name, text in zip(names, texts, strict=True) if name not in special for part in (name, text)]
    whole = _BETWEEN.join(part.translate(_SPACES) for part in known)
    found = {}
    for token in growth.tokens:
        at = whole.find(token.strip() or token)  # spaces around words belong to the tokens beside them
        if at >= 0:
            start, stop = whole.rfind(_BETWEEN, 0, at), whole.find(_BETWEEN, at)
            found[token] = whole[start + len(_BETWEEN) if start >= 0 else 0 : stop if stop >= 0 else None]
    return found


def _token(entry: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken

    flags = {key: value for key, value in entry.items() if key not in ("id", "content")}
    return AddedToken(entry["content"], **flags)
