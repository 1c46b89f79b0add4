"""Outputs that are either complete or not there: work happens in `<output>.partial`, success renames it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sculptor.errors import OutputError


def partial_path(output: Path) -> Path:
    """Where an output is staged."""
    return output.with_name(output.name + ".partial")


@contextmanager
def staging(output: Path, *, overwrite: bool, resume: bool, worth_keeping: Callable[[Path], bool]) -> Iterator[Path]:
    """Creates or takes up the staging directory of an output, and yields it.

    After an error it is removed, unless it holds something a later `--resume` can use.

    Args:
        output: the directory to be made.
        overwrite: allow an existing output (replaced at success only) and discard left-overs.
        resume: take up what a killed run left; nothing left over means starting from the beginning.
        worth_keeping: whether the staging directory holds progress.

    Raises:
        OutputError: if the output exists, something is left over, or the place cannot be written.
    """
    partial = _start(output, overwrite=overwrite, resume=resume)
    try:
        yield partial
    except BaseException:
        if not worth_keeping(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _start(output: Path, *, overwrite: bool, resume: bool) -> Path:
    partial = partial_path(output)
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if partial.exists() and not resume:
        if not overwrite:
            raise OutputError(
                f"{partial}: left over from a run that did not finish; pass --resume to go on or --overwrite to start anew"
            )
        shutil.rmtree(partial)
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        probe = partial / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    return partial


def commit(staged: Path, output: Path) -> None:
    """Puts a complete staged directory in the place of the output; an old one goes only now."""
    with writing(output):
        if output.exists():
            old = output.with_name(output.name + ".old")
            if old.exists():
                shutil.rmtree(old)
            output.rename(old)
            staged.rename(output)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            staged.rename(output)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into one line that names the place."""
    try:
        yield
    except OSError as cause:
        where = cause.filename or path
        raise OutputError(
            f"{where}: cannot write ({cause.strerror or cause}); free some space or choose another place"
        ) from cause


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON so that the file is either the old or the new one, never half of it."""
    with writing(path):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
