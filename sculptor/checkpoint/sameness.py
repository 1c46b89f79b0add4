"""What beside its tensors decides what a user loads from a directory, compared with that of another."""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sculptor.checkpoint.configuration import model_class
from sculptor.checkpoint.declared_dtypes import DTYPE_KEYS, floating_dtypes, index_dtype, inner_dtypes, named_dtype
from sculptor.checkpoint.directory import (
    CONFIG_NAME,
    INDEX_NAME,
    LICENCE,
    companions,
    is_weights,
    second_weights,
)
from sculptor.checkpoint.folders import READ_FOLDERS, is_in, module_folders
from sculptor.checkpoint.plain import bytes_of, is_plain, read_plain
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tensors import read_header
from sculptor.checkpoint.vocabulary import TOKENIZER_NAME, Growth
from sculptor.errors import CheckpointError

# Of a configuration, what says nothing of the model.
_FREE = ("transformers_version", "_name_or_path", "use_cache")
_MISSING = object()
GENERATION_NAME = "generation_config.json"
# What only people read, and what a run itself leaves.
_FOR_PEOPLE = re.compile(
    r"(readme|licen[cs]e|notice|citation|authors|changelog|usage|use_policy)[^/]*|.*\.(md|pdf|png|jpe?g|svg|gif|tfevents.*)"
    r"|sculptor\.json|metrics\.jsonl|train(er|ing)_[^/]*|all_results\.json|eval_results\.json",
    re.IGNORECASE,
)
_TOKENIZER = re.compile(
    r"(.*/)?(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|spiece|sentencepiece)|.*\.(model|spm|bpe|jinja)$"
)


Configuration = Callable[[Mapping[str, Any]], dict[str, Any]]


def differences(
    base: Checkpoint, tuned: Checkpoint, growth: Growth | None = None, head: Configuration | None = None
) -> list[str]:
    """Everything beside tensors that would make another model or tokenizer of `tuned`, one line each.

    May differ: the dtype, if it is that of the tensors, the version of transformers, and what only people read; with
    `growth`, which was found in the files, the new tokens' entries and the size of the vocabulary; with `head` what that
    makes of a configuration.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    changed = head or (growth.config if growth else dict)
    found = [f"config.json: {what}" for what in _config_differences(base, tuned, changed)]
    found += _weight_differences(base, tuned)
    modules = module_folders(base.path)
    inside = _files(tuned, modules)
    every = {name for name in inside if not is_in(name, modules)}
    found += _module_differences(base.path, tuned.path, modules, inside - every)
    before, now = ({name for name in names if not is_weights(name)} for names in (_files(base), every))
    before = {name for name in before if not is_in(name, modules)}
    other_tokenizer = any(map(_TOKENIZER.match, now)) or _makes_a_tokenizer(tuned)
    carried = {path.as_posix() for path in companions(base.path)}
    for name in sorted({*before, *now} - {"config.json"}):
        if name not in before:
            found.append(f"{name} was added")
        elif name not in now:
            # Code, secrets and links are never carried along; where no tokenizer can be loaded, it is no other one.
            if name in carried and (other_tokenizer or not _TOKENIZER.match(name)):
                found.append(f"{name} is missing")
        elif not (growth and name == TOKENIZER_NAME) and not _same_content(base.path / name, tuned.path / name):
            found.append(f"{name} differs")
    extra = second_weights(tuned.path, tuned.files, every)
    if extra is not None:
        found.append(f"{extra} is a second set of weights, which other programs load")
    return found


def setting_differences(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Settings of a loaded model that are not those of a checkpoint, one line each; what only the model has is no setting of it."""
    read = _as_loaded(checkpoint)
    if isinstance(read, str):
        return []
    # As files have them: numbers as keys are text there.
    before, now = (_without(json.loads(json.dumps(each, default=str))) for each in (read, config))
    return [line for line in _settings(before, now) if not line.partition(" was ")[2].startswith("not there")]


def tokenizer_differences(base: Path, other: Path) -> list[str]:
    """Files of a tokenizer in another directory that are not those of a model's, one line each.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    found = []
    for name in sorted(path.as_posix() for path in companions(other)):
        if not _TOKENIZER.match(name) or LICENCE.fullmatch(name):
            continue
        if not (base / name).is_file():
            found.append(f"{name} was added")
        elif not _same_content(base / name, other / name):
            found.append(f"{name} differs")
    return found


def _module_differences(
    base: Path, tuned: Path, modules: Collection[PurePosixPath], now: Collection[str]
) -> Iterator[str]:
    """Files in the folders of modules, which are copied byte for byte, with their weights."""
    carried = {path.as_posix() for path in companions(base) if is_in(path.as_posix(), modules)}
    for name in sorted({*carried, *now}):
        if not (tuned / name).is_file():
            yield f"{name} is missing"
        elif not (base / name).is_file():
            yield f"{name} was added"
        elif _digest(base / name) != _digest(tuned / name):
            yield f"{name} differs"


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as cause:
        raise CheckpointError(f"{path}: not readable ({cause}); restore it") from cause


def _weight_differences(base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    """What is said of the weights, and decides whether and by what they are loaded."""
    for file in tuned.files:
        written = read_header(tuned.path / file, CheckpointError)[1].get("format")
        if written not in ("pt", base.metadata.get("format")):
            yield f"{file}: format was {base.metadata.get('format')}, is {written}"
    if tuned.unlisted and not base.unlisted:
        yield f"{INDEX_NAME} does not name {tuned.unlisted[0]}, so that not every program loads it"
    if (tuned.path / INDEX_NAME).is_file() and not is_plain(tuned.path / INDEX_NAME):
        yield f"{INDEX_NAME} is not read alike by every program (a key twice, or another encoding than UTF-8)"
    before, now = map(index_dtype, (base, tuned))
    if now not in (None, before) and named_dtype(tuned.config) is None and {now} != floating_dtypes(tuned):
        yield f"{INDEX_NAME}: metadata.dtype was {before}, is {now}, and the tensors are not"


def _makes_a_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether transformers makes a tokenizer without any file of one, which knows nothing."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except Exception:  # as it has to be
        return False
    return True


def _config_differences(base: Checkpoint, tuned: Checkpoint, changed: Configuration) -> Iterator[str]:
    before, now = changed(base.config), tuned.config
    stored = floating_dtypes(tuned)
    same = all(tuned.infos[name].dtype == info.dtype for name, info in base.infos.items() if name in tuned.infos)
    # Without a name, the tensors' own is taken.
    allowed = {named_dtype(before)} if same else {None}
    allowed |= stored if len(stored) == 1 else set()
    for dtype in {named_dtype(now, (key,)) for key in DTYPE_KEYS if now.get(key) is not None} or {None}:
        if dtype not in allowed:
            yield f"dtype was {named_dtype(before)}, is {dtype}, and the tensors are not"
    inner: dict[str, set[str | None]] = defaultdict(set)
    for place, dtype in inner_dtypes(before):
        inner[place].add(dtype)
    for place, dtype in inner_dtypes(now):  # saving a configuration fills in the outer one
        if dtype not in allowed | (inner[place] if same else set()):
            yield f"{place}.dtype was {', '.join(map(str, inner[place])) or None}, is {dtype}, and the tensors are not"
    if bytes_of(base.path / CONFIG_NAME) != bytes_of(tuned.path / CONFIG_NAME) and not is_plain(
        tuned.path / CONFIG_NAME
    ):
        yield "is not read alike by every program (a key twice, or another encoding than UTF-8)"
    loaded = [_as_loaded(checkpoint) for checkpoint in (base, tuned)]
    if isinstance(loaded[1], str) and not isinstance(loaded[0], str):
        yield f"transformers does not read it ({loaded[1]})"
        return
    read, read_now = (
        _without(of.config if isinstance(found, str) else found)
        for of, found in zip((base, tuned), loaded, strict=True)
    )
    read = changed(read)
    yield from _settings(read, read_now)
    yield from _unread(_without(before), _without(now), read, read_now)
    yield from _lost(tuned, _without(before), _without(now), read_now)
    versions = [config.get("transformers_version") for config in (before, now)]
    if not isinstance(versions[1], str | None):
        yield f"transformers_version is {_short(versions[1])}"
    if versions[0] != versions[1] and _reads_by_version(tuned.path):
        yield f"transformers_version was {versions[0]}, is {versions[1]}, by which this tokenizer is read"


def _unread(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    read: Mapping[str, Any],
    read_now: Mapping[str, Any],
    place: str = "",
) -> Iterator[str]:
    """Keys of the file that the configuration's class drops and others read: attention, generation. None may be new."""
    for key, value in sorted(now.items()):
        name = f"{place}.{key}" if place else key
        if isinstance(value, dict) and key.endswith("config"):
            old, its, first, second = (
                inner if isinstance(inner := each.get(key), dict) else {} for each in (before, now, read, read_now)
            )
            yield from _unread(old, its, first, second, name)
        elif key not in read_now or key not in read:
            known = before.get(key, _MISSING)
            if known is _MISSING and key in read:  # what was its default stands in the file now
                continue
            yield from _settings(known, value, name)


def _lost(
    tuned: Checkpoint, before: Mapping[str, Any], now: Mapping[str, Any], read: Mapping[str, Any]
) -> Iterator[str]:
    """Keys that generation reads in the base's file, where it has none of its own; saving a configuration drops them."""
    from transformers import GenerationConfig

    if (tuned.path / GENERATION_NAME).is_file() or not _generates(tuned):
        return
    defaults = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    for key in sorted(before.keys() & defaults.keys() - now.keys() - read.keys()):
        if before[key] is not None and before[key] != defaults[key]:
            yield from _settings(before[key], _MISSING, key)


def _generates(checkpoint: Checkpoint) -> bool:
    """Whether its class does; one that is not known may."""
    try:
        return bool(model_class(checkpoint.config, checkpoint.path).can_generate())
    except CheckpointError:
        return True


def _reads_by_version(path: Path) -> bool:
    """Whether a tokenizer asks which version of transformers wrote the model."""
    try:
        found = json.loads((path / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found.get("fix_mistral_regex"))


def _as_loaded(checkpoint: Checkpoint) -> Mapping[str, Any] | str:
    """A configuration with its defaults, as transformers reads it: saving it anew writes other keys of the same meaning.

    Why it does not, where this transformers has no such class, or the configuration breaks it.
    """
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=False, local_files_only=True
        ).to_dict()
    except Exception as cause:  # it raises what it likes
        return " ".join(str(cause).split())[:120] or type(cause).__name__
    # What is no setting of the class is kept by it; code is named in the file alone.
    return found | {key: checkpoint.config[key] for key in ("auto_map", "architectures") if key in checkpoint.config}


def _without(config: Mapping[str, Any], free: Container[str] = (*_FREE, *DTYPE_KEYS)) -> dict[str, Any]:
    """A configuration, and those in it, without what may differ; an inner dtype gives way to the outer one."""
    kept = {key: value for key, value in config.items() if key not in free}
    for key, value in kept.items():
        if isinstance(value, dict) and key.endswith("config"):
            kept[key] = _without(value, DTYPE_KEYS)
        elif isinstance(value, dict) and key == "id2label":  # numbers, which files have as texts
            kept[key] = {str(number): name for number, name in value.items()}
    return kept


def _settings(before: Any, now: Any, place: str = "", numbers: bool = False) -> Iterator[str]:
    """Names of settings that differ, with both values; null is not the same as nothing, nor true as 1, with `numbers` nor 1.0."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            inner = f"{place}.{key}" if place else key
            yield from _settings(before.get(key, _MISSING), now.get(key, _MISSING), inner, numbers)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _settings(old, new, f"{place}[{i}]", numbers)
    elif (
        isinstance(before, bool) != isinstance(now, bool)
        or before != now
        or (numbers and type(before) is not type(now))
    ):
        yield f"{place} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = "not there" if value is _MISSING else ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _files(checkpoint: Checkpoint, modules: Collection[PurePosixPath] = ()) -> set[str]:
    """What may be loaded: all files but hidden ones, what people read, and outputs of ours in folders; links count.

    In these, and under the names of what people read, weights of other programs count all the same.
    """
    found = set()
    ours: list[Path] = []
    for folder, inner, names in os.walk(checkpoint.path, followlinks=True):
        here = Path(folder)
        parts = here.relative_to(checkpoint.path).parts
        if len(parts) > _DEPTH:
            inner.clear()
            continue
        read = set(parts) & set(READ_FOLDERS) or is_in("/".join((*parts, "any")), modules)
        if parts and not read and any((here / name).is_file() for name in _OURS):
            ours.append(here)
        inside = any(here.is_relative_to(output) for output in ours)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in names:
            by_us = inside and (_is_written(name) or not is_weights(name))
            for_people = not parts and _FOR_PEOPLE.fullmatch(name) and not is_weights(name)
            if not name.startswith(".") and not for_people and not by_us:
                found.add((here / name).relative_to(checkpoint.path).as_posix())
    return found


def _is_written(name: str) -> bool:
    """Whether weights are of a kind that sculptor writes."""
    return name.endswith((".safetensors", INDEX_NAME))


_DEPTH = 3  # links may lead in circles
_OURS = ("archive.json", "sculptor.json")


def _same_content(one: Path, other: Path) -> bool:
    a, b = map(bytes_of, (one, other))
    if a == b:
        return True
    try:
        before, now = map(read_plain, (a, b))
    except (ValueError, RecursionError):
        return False
    if one.name == GENERATION_NAME and isinstance(before, dict) and isinstance(now, dict):
        before, now = (_without(content, ("transformers_version",)) for content in (before, now))
    return not any(_settings(before, now, numbers=True))
