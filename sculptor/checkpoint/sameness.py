"""What beside its tensors decides what a user loads from a directory, compared with that of another."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sculptor.checkpoint.directory import is_loaded, second_weights
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tensors import dtype_name
from sculptor.errors import CheckpointError
from sculptor.validation import read_file

# Of a configuration, what says nothing of the model.
_FREE = ("transformers_version", "_name_or_path", "use_cache")
_DTYPES = ("dtype", "torch_dtype")


def differences(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Everything beside tensors that would make another model or tokenizer of `tuned`, one line each.

    May differ: the dtype, if it is that of the tensors, the version of transformers, and what only people read.

    Raises:
        CheckpointError: if a file cannot be read.
    """
    found = [f"config.json: {what}" for what in _settings(base.config, tuned.config, _stored_dtypes(base, tuned))]
    names = sorted({*_loaded_files(base.path), *_loaded_files(tuned.path)} - {"config.json"})
    for name in names:
        one, other = base.path / name, tuned.path / name
        if not one.is_file():
            found.append(f"{name} was added")
        elif not other.is_file():
            if name.endswith(".py"):  # code is never carried along
                continue
            found.append(f"{name} is missing")
        elif not _same_content(one, other):
            found.append(f"{name} differs")
    extra = second_weights(tuned.path, tuned.files)
    if extra is not None:
        found.append(f"{extra} is a second set of weights, which other programs load")
    return found


def _stored_dtypes(base: Checkpoint, tuned: Checkpoint) -> set[str | None]:
    """What a configuration may call the dtype: as before, or as everything is stored."""
    stored = {dtype_name(info.dtype) for info in tuned.infos.values() if info.dtype.is_floating_point}
    before: set[str | None] = {_dtype(base.config)}
    same = all(tuned.infos[name].dtype == info.dtype for name, info in base.infos.items() if name in tuned.infos)
    return (before if same else set()) | (stored if len(stored) == 1 else before)


def _dtype(config: Mapping[str, Any]) -> str | None:
    found = next((config[key] for key in _DTYPES if config.get(key) is not None), None)
    return found.removeprefix("torch.") if isinstance(found, str) else None


def _settings(before: Any, now: Any, dtypes: set[str | None], place: str = "") -> Iterator[str]:
    """Names of settings that differ, with both values."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        if before != now:
            yield f"{place} was {_short(before)}, is {_short(now)}"
        return
    if _dtype(now) != _dtype(before) and _dtype(now) not in dtypes:
        yield f"{place + '.' if place else ''}dtype was {_dtype(before)}, is {_dtype(now)}, and the tensors are not"
    for key in sorted({*before, *now} - {*_FREE, *_DTYPES}):
        yield from _settings(before.get(key), now.get(key), dtypes, f"{place}.{key}" if place else key)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _loaded_files(path: Path) -> Iterator[str]:
    for item in path.rglob("*"):
        relative = item.relative_to(path)
        if item.is_file() and is_loaded(relative.as_posix()):
            yield relative.as_posix()


def _same_content(one: Path, other: Path) -> bool:
    a, b = (read_file(path, CheckpointError, "restore it") for path in (one, other))
    if a == b:
        return True
    try:
        before, now = json.loads(a), json.loads(b)
    except (ValueError, RecursionError):
        return False
    return not any(_settings(before, now, set()))
