"""Outputs that are either complete or not there: work happens in `<output>.partial`, success renames it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sculptor.errors import OutputError

LOCK_NAME = ".lock"


def partial_path(output: Path) -> Path:
    """Where an output is staged."""
    return output.with_name(output.name + ".partial")


def check_apart(output: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses an output that is, or holds, something the run reads: `--overwrite` would delete it.

    Raises:
        OutputError: naming the input.
    """
    resolved = output.resolve()
    for item in map(Path, inputs):
        if item.exists() and (item.resolve() == resolved or resolved in item.resolve().parents):
            raise OutputError(f"{output}: is or holds the input {item}; choose another --output")


@contextmanager
def staging(output: Path, *, overwrite: bool, resume: bool, worth_keeping: Callable[[Path], bool]) -> Iterator[Path]:
    """Creates or takes up the staging directory of an output, and yields it.

    It is locked, so that no second run writes there. After an error it is removed, unless it holds something a
    later `--resume` can use.

    Args:
        output: the directory to be made.
        overwrite: allow an existing output (replaced at success only) and discard left-overs.
        resume: take up what a killed run left; nothing left over means starting from the beginning.
        worth_keeping: whether the staging directory holds progress.

    Raises:
        OutputError: if the output exists, something is left over, or the place cannot be written.
    """
    with writing(output):
        _check_place(output, overwrite=overwrite, resume=resume)
        partial = partial_path(output)
        partial.mkdir(parents=True, exist_ok=True)
        lock = FileLock(partial / LOCK_NAME)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"{partial}: another run is writing there; wait for it or choose another --output"
            ) from None
    try:
        if not resume:
            _empty(partial)
        yield partial
    except BaseException:
        if not worth_keeping(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def _empty(partial: Path) -> None:
    """Removes what another run left; the lock stays."""
    for item in partial.iterdir():
        if item.name != LOCK_NAME:
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def _check_place(output: Path, *, overwrite: bool, resume: bool) -> None:
    partial = partial_path(output)
    if output.exists() and resume and not overwrite:
        raise OutputError(f"{output}: exists already, there is nothing to resume; pass --overwrite to start anew")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if output.exists() and not _is_output(output):
        raise OutputError(f"{output}: is neither a checkpoint nor an archive, so --overwrite does not touch it")
    if partial.exists() and not (resume or overwrite):
        raise OutputError(
            f"{partial}: left over from a run that did not finish; pass --resume to go on or --overwrite to start anew"
        )


def _is_output(path: Path) -> bool:
    """Whether a directory is something this program writes, or empty."""
    known = ("archive.json", "sculptor.json", "config.json")
    return path.is_dir() and (not any(path.iterdir()) or any((path / name).is_file() for name in known))


def commit(staged: Path, output: Path) -> None:
    """Puts a complete staged directory in the place of the output; an old one goes only now."""
    with writing(output):
        (staged / LOCK_NAME).unlink(missing_ok=True)
        if output.exists():
            old = Path(tempfile.mkdtemp(prefix=output.name + ".old-", dir=output.parent))
            output.rename(old / output.name)
            staged.rename(output)
            shutil.rmtree(old)
        else:
            staged.rename(output)


# Inputs are told by digests, which say nothing to a reader.
_HINTS = {
    "base": "the matrices of the model changed since",
    "rows": "the data files hold other rows now",
    "tokens": "the same rows have other tokens now: another tokenizer or chat template, or one that prints the date",
}


def key_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What makes a run another than the one that left something to resume: settings with both values, inputs by name."""
    different = sorted(name for name in now if saved.get(name) != now[name])
    if not different:
        return None
    name = next((name for name in ("model", *_HINTS) if name in different), different[0])
    old, new = saved.get(name), now[name]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        if name == "model":
            return f"{', '.join(different)}; {', '.join(changed[:3])}{more} changed since"
        name, old, new = f"{name}.{changed[0]}", old.get(changed[0]), new.get(changed[0])
    return f"{', '.join(different)}; {_HINTS.get(name) or f'{name} was {_short(old)}, now {_short(new)}'}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into one line that names the place."""
    try:
        yield
    except SafetensorError as cause:  # the library reports a full disk as its own error
        raise OutputError(f"{path}: cannot write ({cause}); free some space or choose another place") from cause
    except OSError as cause:
        where = cause.filename or path
        raise OutputError(
            f"{where}: cannot write ({cause.strerror or cause}); free some space or choose another place"
        ) from cause


def write_json(path: Path, content: dict[str, Any], *, allow_nan: bool = False) -> None:
    """Writes JSON so that the file is either the old or the new one, never half of it."""
    with writing(path):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1, allow_nan=allow_nan) + "\n", encoding="utf-8")
        os.replace(temporary, path)
