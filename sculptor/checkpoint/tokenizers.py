"""What a tokenizer is once transformers has loaded it: files may say the same in several ways, and another in one more name."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculptor.checkpoint.plain import read_plain

# Of what a tokenizer was made with: where it lay, and what is compared by itself.
_ASIDE = frozenset({"name_or_path", "is_local", "local_files_only", "added_tokens_decoder", "chat_template"})
# What saving writes of how it was loaded, or under another name.
_WRITTEN = frozenset({"is_local", "local_files_only", "added_tokens_decoder", "tokenizer_class", "backend"})
_PARTS_ASIDE = ("added_tokens", "padding", "truncation", "version")
_TEXTS = (
    "The year 2024, it's 3.14 \u2014 na\u00efve?\n\n  x=1;",
    "\u4f60\u597d  \u043c\u0438\u0440 \U0001f600\t<s> [CLS]",
    "",
)


def load_plainly(path: Path) -> Any:
    """The tokenizer of a directory, by transformers' own classes.

    Raises:
        Exception: whatever a damaged file makes them raise.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer beside that of a base.

    Attributes:
        differences: how it is another, a line each.
        settings: what it was made with; nothing if it is not loaded.
        chat_template: that it applies.
    """

    differences: Sequence[str]
    settings: Collection[str] = ()
    chat_template: Any = None


def compare_loaded(base: Path, other: Path, new: Collection[str] = ()) -> LoadedTokenizer | None:
    """The tokenizer that transformers loads from a directory beside that of another one.

    Args:
        base: a checkpoint.
        other: what is compared with it.
        new: tokens that it may have beyond.

    Returns:
        None where the base's is not loaded: there is none, or this transformers does not know it.
    """
    try:
        before = _facts(load_plainly(base), ())
    except Exception:  # files break it in any way they like; they are compared by themselves
        return None
    try:
        tokenizer = load_plainly(other)
        now = _facts(tokenizer, new)
    except Exception as cause:
        reason = " ".join(str(cause).split())[:80] or type(cause).__name__
        return LoadedTokenizer([f"the tokenizer is not loaded any more ({reason})"])
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    lines = [f"the tokenizer that is loaded differs: {', '.join(different[:5])}"] if different else []
    return LoadedTokenizer(lines, tokenizer.init_kwargs.keys(), tokenizer.chat_template)


def accounted_for(one: Path, other: Path, loaded: LoadedTokenizer) -> bool:
    """Whether all that another `tokenizer_config.json` says anew is in the tokenizer as it is loaded, which is the same.

    Args:
        one: of the base; it may not be there.
        other: of the directory whose tokenizer was `loaded`.
    """
    try:
        before, now = read_plain(one.read_bytes()) if one.is_file() else {}, read_plain(other.read_bytes())
        changed = {key for key, value in now.items() if key not in before or before[key] != value}
    except (OSError, ValueError, RecursionError, AttributeError):
        return False
    if now.get("chat_template", loaded.chat_template) != loaded.chat_template:
        return False
    return all(key in loaded.settings or key in _WRITTEN for key in changed - {"chat_template"})


def same_pipeline(one: Path, other: Path) -> bool:
    """Whether two `tokenizer.json` make the same tokenizer, in whichever version's form they were written."""
    from tokenizers import Tokenizer

    try:
        first, second = (json.loads(Tokenizer.from_file(str(file)).to_str()) for file in (one, other))
    except Exception:  # it raises what it likes
        return False
    return bool(first == second)


def _facts(tokenizer: Any, new: Collection[str]) -> dict[str, Any]:
    """All that decides which tokens a text becomes, and which text tokens become."""
    vocabulary = tokenizer.get_vocab()
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content not in new}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline: Mapping[str, Any] = {} if backend is None else json.loads(backend.to_str())
    made_with = {key: value for key, value in tokenizer.init_kwargs.items() if not _is_aside(key)}
    return {
        "vocabulary": {token: i for token, i in vocabulary.items() if token not in new},
        "added tokens": {i: repr(token) for i, token in added.items()},
        "special tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "chat template": tokenizer.chat_template,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "length": tokenizer.model_max_length,
        "inputs": list(tokenizer.model_input_names),
        "tokens of texts": [tokenizer(text, verbose=False).input_ids for text in _TEXTS],
        **{f"pipeline: {key}": value for key, value in pipeline.items() if key not in _PARTS_ASIDE},
        **{f"setting {key}": _as_text(value) for key, value in made_with.items()},
    }


def _as_text(value: Any) -> Any:
    """A token by what it is written as; its flags are among the added tokens."""
    if isinstance(value, list | tuple):
        return [_as_text(each) for each in value]
    if isinstance(value, dict):
        return [(key, _as_text(each)) for key, each in value.items()]  # whose order decides numbers
    return value if isinstance(value, bool | int | float | None) else str(value)


def _is_aside(key: str) -> bool:
    return key in _ASIDE or key.endswith("_file")
