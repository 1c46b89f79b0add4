"""What beside its tensors decides what a user loads from a directory, compared with that of another."""

import functools
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from sculptor.checkpoint.config_differences import (
    Configuration,
    config_differences,
    generates,
    is_derived,
    padded,
    settings,
    without,
)
from sculptor.checkpoint.configuration import GENERATION_NAME
from sculptor.checkpoint.declared_dtypes import floating_dtypes, index_dtype, named_dtype
from sculptor.checkpoint.directory import CONFIG_NAME, INDEX_NAME, LICENCE, companions, is_weights, second_weights
from sculptor.checkpoint.folders import READ_FOLDERS, TEMPLATES, is_in, module_folders
from sculptor.checkpoint.plain import bytes_of, is_plain, read_plain
from sculptor.checkpoint.processors import PROCESSOR_FILES, same_processor
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tensors import read_header
from sculptor.checkpoint.tokenizers import (
    OF_TOKENIZER,
    LoadedTokenizer,
    accounted_for,
    compare_loaded,
    is_consistent,
    load_plainly,
    same_pipeline,
)
from sculptor.checkpoint.vocabulary import TOKENIZER_NAME, Growth
from sculptor.errors import CheckpointError

TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
# What only people read, and what a run itself leaves.
_FOR_PEOPLE = re.compile(
    r"(readme|licen[cs]e|notice|citation|authors|changelog|usage|use_policy)[^/]*|.*\.(md|pdf|png|jpe?g|svg|gif|tfevents.*)"
    r"|sculptor\.json|metrics\.jsonl|train(er|ing)_[^/]*|all_results\.json|eval_results\.json",
    re.IGNORECASE,
)
_TRAINERS = re.compile(r"checkpoint-\d+")


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
    modules = module_folders(base.path)
    inside = _files(tuned, modules)
    every = {name for name in inside if not is_in(name, modules)}
    before, now = ({name for name in names if not is_weights(name)} for names in (_files(base), every))
    before = {name for name in before if not is_in(name, modules)}
    new = growth.tokens if growth else ()
    places = {"", *(name.rpartition("/")[0] for name in before if name.endswith(f"/{TOKENIZER_CONFIG_NAME}"))}
    loaded = {place: compare_loaded(base.path / place, tuned.path / place, new) for place in places}
    pad_id = None if loaded[""] is None else loaded[""].pad_id
    found = [f"config.json: {what}" for what in config_differences(base, tuned, changed, pad_id)]
    found += _weight_differences(base, tuned)
    found += _module_differences(base.path, tuned.path, modules, inside - every)
    others = len(found)
    of_tokenizer = any(map(OF_TOKENIZER.match, now)) or _makes_a_tokenizer(tuned)
    found += _file_differences(base, tuned, before, now, loaded, of_tokenizer, growth, head)
    for place, tokenizer in loaded.items():
        told = any(OF_TOKENIZER.match(line) and line.rpartition("/")[0] == place for line in found[others:])
        if tokenizer is not None and not told and of_tokenizer and (tokenizer.tokenizer is not None or not found):
            found += [
                f"{place}{': ' if place else ''}{line}" for line in tokenizer.differences
            ]  # which nothing else explains
    extra = second_weights(tuned.path, tuned.files, every)
    if extra is not None:
        found.append(f"{extra} is a second set of weights, which other programs load")
    return found


def _file_differences(
    base: Checkpoint,
    tuned: Checkpoint,
    before: Collection[str],
    now: Collection[str],
    loaded: Mapping[str, LoadedTokenizer | None],
    of_tokenizer: bool,
    growth: Growth | None,
    head: Configuration | None,
) -> Iterator[str]:
    """Files that are no configuration of the model and no weights: missing, added, or of other content."""
    carried = {path.as_posix() for path in companions(base.path)}
    same_processors = functools.cache(lambda: same_processor(base.path, tuned.path))
    pad_id = None if loaded[""] is None else loaded[""].pad_id
    for name in sorted({*before, *now} - {CONFIG_NAME}):
        one, other, place = base.path / name, tuned.path / name, name.rpartition("/")[0]
        of = "" if place == TEMPLATES else place
        tokenizer = loaded.get(of)
        same = tokenizer is not None and not tokenizer.differences and f"{of}/{TOKENIZER_NAME}".lstrip("/") in now
        if name not in now:
            # Code, secrets and links are never carried along; where no tokenizer can be loaded, it is no other one.
            needless = OF_TOKENIZER.match(name) and (same or (not place and not of_tokenizer))
            needless = needless or (name == GENERATION_NAME and head is not None and not generates(tuned))
            needless = needless or (name in PROCESSOR_FILES and same_processors())
            if name in carried and not needless:
                yield f"{name} is missing"
        elif (same and tokenizer is not None and _says_the_same(name, one, other, tokenizer)) or (
            name in PROCESSOR_FILES and not (name in before and _same_content(one, other)) and same_processors()
        ):
            continue
        elif name not in before:
            if not (name == GENERATION_NAME and is_derived(base, tuned, pad_id)):
                yield f"{name} was added"
        elif not (growth and name == TOKENIZER_NAME) and not _same_content(one, other, pad_id):
            yield f"{name} differs"


def tokenizer_differences(base: Path, other: Path) -> list[str]:
    """Files of a tokenizer in another directory that are not those of a model's, one line each.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    found = []
    for name in sorted(path.as_posix() for path in companions(other)):
        if not OF_TOKENIZER.match(name) or LICENCE.fullmatch(name):
            continue
        if not (base / name).is_file():
            found.append(f"{name} was added")
        elif not _same_content(base / name, other / name):
            found.append(f"{name} differs")
    return found


def _says_the_same(name: str, one: Path, other: Path, loaded: LoadedTokenizer) -> bool:
    """Whether a file of a tokenizer that is loaded as before is that of the base in another form, for others who read it, too."""
    place, leaf = PurePosixPath(name).parent.name, PurePosixPath(name).name
    if leaf == TEMPLATE_NAME or (place == TEMPLATES and leaf.endswith(".jinja") and not leaf.startswith(".")):
        known = loaded.template("default" if leaf == TEMPLATE_NAME else leaf.removesuffix(".jinja"))
        return known is not None and other.read_text(encoding="utf-8", errors="replace") == known
    if leaf == TOKENIZER_NAME:
        return same_pipeline(one, other) if one.is_file() else is_consistent(other)
    return leaf == TOKENIZER_CONFIG_NAME and accounted_for(one, other, loaded)


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
    try:
        load_plainly(checkpoint.path)
    except Exception:  # as it has to be
        return False
    return True


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
        if _TRAINERS.fullmatch(here.name) and parts and "trainer_state.json" in names:
            inner.clear()  # another model, which a trainer can go on with
            continue
        read = set(parts) & set(READ_FOLDERS) or is_in("/".join((*parts, "any")), modules)
        if parts and not read and any((here / name).is_file() for name in _OURS):
            ours.append(here)
        inside = any(here.is_relative_to(output) for output in ours)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in names:
            code = name.endswith(".py")  # which a loader may be told to run
            by_us = inside and (_is_written(name) or not is_weights(name)) and not code
            for_people = name.startswith("events.out.tfevents") or (
                not parts and _FOR_PEOPLE.fullmatch(name) and not is_weights(name)
            )
            if not name.startswith(".") and (code or not for_people) and not by_us:
                found.add((here / name).relative_to(checkpoint.path).as_posix())
    return found


def _is_written(name: str) -> bool:
    """Whether weights are of a kind that sculptor writes."""
    return name.endswith((".safetensors", INDEX_NAME))


_DEPTH = 3  # links may lead in circles
_OURS = ("archive.json", "sculptor.json")


def _same_content(one: Path, other: Path, pad_id: int | None = None) -> bool:
    a, b = map(bytes_of, (one, other))
    if a == b:
        return True
    try:
        before, now = map(read_plain, (a, b))
    except (ValueError, RecursionError):
        return False
    if one.name == GENERATION_NAME and isinstance(before, dict) and isinstance(now, dict):
        before, now = (without(content, ("transformers_version",)) for content in (before, now))
        before = padded(before, now, pad_id)
    return not any(settings(before, now, numbers=True))
