"""What a tokenizer is once transformers has loaded it: files may say the same in several ways, and another in one more name."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculptor.checkpoint.config_differences import MISSING, settings
from sculptor.checkpoint.configuration import GENERATION_NAME
from sculptor.checkpoint.directory import companions
from sculptor.checkpoint.plain import read_plain
from sculptor.validation import file_digest

# Of what a tokenizer was made with: where it lay, and what is compared by itself.
_ASIDE = frozenset({"name_or_path", "is_local", "local_files_only", "added_tokens_decoder", "chat_template"})
# What saving writes of how it was loaded, and what the last call asked for, which every call says anew.
_WRITTEN = frozenset({"is_local", "local_files_only", "backend"})
_OF_CALLS = frozenset(
    {"max_length", "stride", "pad_to_multiple_of", "pad_token_type_id", "padding", "padding_side"}
    | {"truncation", "truncation_side", "truncation_strategy"}
)
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
# Which every call of transformers sets anew, and saving writes as they were last.
_BY_CALLS = ("padding", "truncation")
_PARTS_ASIDE = ("added_tokens", "version", *_BY_CALLS)
OF_TOKENIZER = re.compile(
    r"(.*/)?(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece|sentencepiece)|.*\.(model|spm|bpe|jinja)$"
)
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_TEXTS = (
    "The year 2024, it's 3.14 \u2014 na\u00efve?\n\n  x=1;",
    "\u4f60\u597d  \u043c\u0438\u0440 \U0001f600\t<s> [CLS]",
    "",
)


def speech_digest(path: Path) -> str:
    """SHA-256 of the files by which text becomes tokens, and an answer is generated: what a run that goes on needs as it was."""
    names = sorted(name.as_posix() for name in companions(path))
    spoken = [name for name in names if OF_TOKENIZER.match(name) or name == GENERATION_NAME]
    lines = "".join(f"{name}={file_digest(path / name)}\n" for name in spoken)
    return hashlib.sha256(lines.encode()).hexdigest()


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Around the `tokenizers` library, which ends in a panic, no `Exception`, where a damaged file breaks it."""
    try:
        yield
    except BaseException as cause:
        if type(cause).__name__ == "PanicException":
            raise ValueError(f"the tokenizers library fails: {cause}") from cause
        raise


@panics_as_errors()
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
        tokenizer: as it is loaded; None if it is not.
    """

    differences: Sequence[str]
    tokenizer: Any = None

    @property
    def pad_id(self) -> int | None:
        """What it pads with."""
        return getattr(self.tokenizer, "pad_token_id", None)

    def template(self, name: str) -> str | None:
        """The chat template of a name, "default" that of none."""
        return _templates(self.tokenizer).get(name)


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
    different = sorted(key for key in {*before, *now} if any(settings(before.get(key), now.get(key), numbers=True)))
    lines = [f"the tokenizer that is loaded differs: {', '.join(different[:5])}"] if different else []
    return LoadedTokenizer(lines, tokenizer)


def accounted_for(one: Path, other: Path, loaded: LoadedTokenizer) -> bool:
    """Whether all that another `tokenizer_config.json` says anew is in the tokenizer as it is loaded, which is the same.

    Args:
        one: of the base; it may not be there.
        other: of the directory whose tokenizer was `loaded`.
    """
    try:
        before, now = read_plain(one.read_bytes()) if one.is_file() else {}, read_plain(other.read_bytes())
        changed = {
            key: value for key, value in now.items() if any(settings(before.get(key, MISSING), value, "it", True))
        }
    except (OSError, ValueError, RecursionError, AttributeError):
        return False
    return all(_is_said(key, value, loaded) for key, value in changed.items())


def _is_said(key: str, value: Any, loaded: LoadedTokenizer) -> bool:
    """Whether one setting of a file is that of the tokenizer: other programs read the file."""
    tokenizer = loaded.tokenizer
    if key == "chat_template":
        named = value if isinstance(value, list) else [{"name": "default", "template": value}]
        return all(
            isinstance(each, dict) and each.get("template") == loaded.template(str(each.get("name"))) for each in named
        )
    if key == "tokenizer_class":
        name = type(tokenizer).__name__
        return value in (name, f"{name}Fast", *(["PreTrainedTokenizerFast"] if name == "TokenizersBackend" else []))
    if key == "added_tokens_decoder":
        own = {str(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        return isinstance(value, dict) and all(i in own and _is_token(each, own[i]) for i, each in value.items())
    if isinstance(value, dict) and "content" in value:
        known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        return value["content"] in known and _is_token(value, known[value["content"]])
    named = tokenizer.special_tokens_map.get(
        key
    )  # of whichever name: saving writes those of a list of names by themselves
    return key in tokenizer.init_kwargs or key in _WRITTEN or key in _OF_CALLS or (named is not None and named == value)


def _is_token(said: Any, token: Any) -> bool:
    return (
        isinstance(said, dict)
        and said.get("content") == token.content
        and all(said.get(flag, getattr(token, flag)) == getattr(token, flag) for flag in _FLAGS)
    )


def same_pipeline(one: Path, other: Path) -> bool:
    """Whether two `tokenizer.json` make the same tokenizer, in whichever version's form they were written.

    How a text was padded or cut at last is no part of it: every call of transformers says that anew.
    """
    first, second = _pipeline(one), _pipeline(other)
    return first is not None and first == second


def notes_of_calls(base: Path, other: Path) -> Iterator[str]:
    """How a `tokenizer.json` pads or cuts by itself and that of the base does not, a line each."""
    before, now = (_said_of_calls(path / "tokenizer.json") for path in (base, other))
    for key, value in now.items():
        if value is not None and value != before.get(key):
            yield (
                f"tokenizer.json has {key} of its own, which transformers sets anew in every call; programs that read the file "
                "alone go by it"
            )


def _said_of_calls(file: Path) -> dict[str, Any]:
    try:
        content = read_plain(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: content.get(key) for key in _BY_CALLS} if isinstance(content, dict) else {}


def is_consistent(file: Path) -> bool:
    """Whether a `tokenizer.json` gives added tokens the numbers that they are loaded with: other programs read these."""
    return _pipeline(file) is not None


def _pipeline(file: Path) -> dict[str, Any] | None:
    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            made, raw = Tokenizer.from_file(str(file)), read_plain(file.read_bytes())
        told = all(made.token_to_id(token["content"]) == token["id"] for token in raw.get("added_tokens") or ())
        content = json.loads(made.to_str())
    except Exception:  # it raises what it likes
        return None
    # No prefix and an empty one are the same, and saving writes either.
    model = {key: value for key, value in content["model"].items() if key not in _AFFIXES or value}
    rest = {key: value for key, value in content.items() if key not in _BY_CALLS}
    return rest | {"model": model} if told else None


def _templates(tokenizer: Any) -> dict[str, str]:
    """Chat templates by name."""
    found = getattr(tokenizer, "chat_template", None)
    return dict(found) if isinstance(found, dict) else {} if found is None else {"default": found}


@panics_as_errors()
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
        "chat template": _templates(tokenizer),
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
    return key in _ASIDE or key in _OF_CALLS or key.endswith("_file")
