"""Outputs that are either complete or not there: work happens in `<output>.partial`, success renames it."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sculptor.checkpoint.durable import make_durable
from sculptor.checkpoint.tensors import remedy_of
from sculptor.checkpoint.written import (
    LOCK_NAME,
    MARKER_NAME,
    STAGED_SUFFIX,
    begin,
    begun_by,
    discard,
    empty,
    list_files,
    not_ours,
    note,
    note_moved,
    strange_file,
)
from sculptor.errors import OutputError
from sculptor.interruption import Interrupted, signals_wait

STAGED_NAME = "output"  # where in a staging directory an output is made that leaves other things behind on its way


class NotPlacedError(OutputError):
    """An output is complete, and could not be put in its place."""


def partial_path(output: Path) -> Path:
    """Where an output is staged."""
    return output.with_name(output.name + STAGED_SUFFIX)


def check_apart(output: Path, inputs: Iterable[str | Path]) -> None:
    """Refuses an output that is, or holds, something the run reads, or is staged there: `--overwrite` would delete it.

    Nor may it lie in a directory that is read, which would be another one then.

    Raises:
        OutputError: naming the input.
    """
    for item in map(Path, inputs):
        if not os.path.exists(item):
            continue
        if item.is_dir() and item.resolve() in output.resolve().parents:
            raise OutputError(f"{output}: lies in the input {item}; choose a place beside it")
        # Files of a directory may be links into the output.
        read = [item, *(item.iterdir() if item.is_dir() else ())]
        for resolved, place in itertools.product((each.resolve() for each in read), (output, partial_path(output))):
            if resolved == place.resolve() or place.resolve() in resolved.parents:
                staged = "" if place == output else f"is staged in {place}, which "
                raise OutputError(f"{output}: {staged}is or holds the input {item}; choose another place")


def check_free(output: Path, *, command: str, overwrite: bool, resume: bool | None = None) -> None:
    """Refuses a place that `staging` would refuse, before any work; arguments as there.

    Raises:
        OutputError: if the output exists, something is left over, or the place cannot be read.
    """
    partial = partial_path(output)
    if output.name.endswith(STAGED_SUFFIX):
        raise OutputError(
            f"{output}: names that end in .partial are those of unfinished outputs; choose another --output"
        )
    with writing(output), writing(partial):
        _check_output(output, overwrite=overwrite, resume=resume)
        _check_left_over(partial, command, overwrite=overwrite, resume=resume)


@contextmanager
def staging(
    output: Path,
    *,
    command: str,
    overwrite: bool,
    resume: bool | None,
    worth_keeping: Callable[[Path], bool],
) -> Iterator[Path]:
    """Creates or takes up the staging directory of an output, and yields it.

    It is locked, so that no second run writes there, and marked; only what a run writes there is ever removed. After an
    error it goes, unless it holds something a later `--resume` can use, or a complete output.

    Args:
        output: the directory to be made.
        command: that makes it; what another one left is not taken up.
        overwrite: allow an existing output (replaced at success only) and discard left-overs.
        resume: take up what a killed run left; nothing left over means starting from the beginning. None where a command
            has no such option.
        worth_keeping: whether the staging directory holds progress.

    Raises:
        OutputError: if the output exists, something is left over, or the place cannot be written.
    """
    partial = partial_path(output)
    check_free(output, command=command, overwrite=overwrite, resume=resume)
    with writing(partial):
        lock = _lock(partial)
    try:
        _check_output(output, overwrite=overwrite, resume=resume)  # another run may have finished since
        with writing(partial):
            if not resume:
                empty(partial)
            begin(partial, command)
        yield partial
    except NotPlacedError as error:
        raise NotPlacedError(f"{error}{'' if resume is None else ', or pass --resume'}") from error.__cause__
    except BaseException as error:
        with signals_wait():
            if not worth_keeping(partial):
                discard(partial)
            elif isinstance(error, Interrupted) and resume is not None:
                error.kept = partial
            if isinstance(error, Interrupted):
                error.resumable |= resume is not None
        raise
    finally:
        lock.release()


@contextmanager
def one_pass(output: Path, *, command: str, overwrite: bool) -> Iterator[Path]:
    """`staging` of what is written at once, with nothing to resume: yields the directory that then becomes the output."""
    with staging(output, command=command, overwrite=overwrite, resume=None, worth_keeping=lambda _: False) as partial:
        staged = partial / STAGED_NAME
        with writing(staged):
            staged.mkdir()
        yield staged
        put_in_place(partial, output, overwrite=overwrite)


def _lock(partial: Path) -> FileLock:
    """Makes the directory and locks it; it may be renamed by a run that finishes, until it is locked."""
    while True:
        fresh = not partial.exists()
        partial.mkdir(parents=True, exist_ok=True)
        if fresh:
            (partial / MARKER_NAME).touch()
        path = partial / LOCK_NAME
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise _busy(partial) from None
        if path.exists():
            return lock
        lock.release()


def _check_output(output: Path, *, overwrite: bool, resume: bool | None) -> None:
    if not output.exists():
        above = next((parent for parent in output.parents if parent.exists()), None)
        if above is not None and not above.is_dir():
            raise OutputError(f"{output}: {above} is a file, and no directory; choose another --output")
        return
    if resume and not overwrite:
        raise OutputError(f"{output}: exists already, there is nothing to resume; pass --overwrite to start anew")
    if not overwrite:
        raise OutputError(f"{output}: exists already; choose another --output or pass --overwrite")
    foreign = not_ours(output)
    if foreign is not None:
        raise OutputError(f"{output}: {foreign}, so --overwrite does not touch it; choose another --output")


def _check_left_over(partial: Path, command: str, *, overwrite: bool, resume: bool | None) -> None:
    found = _in_the_way(partial)
    if found is not None:
        raise OutputError(f"{partial}: {found}; move it or choose another --output")
    if not partial.exists():
        return
    _check_unlocked(partial)
    other = begun_by(partial)
    if resume and not overwrite and other not in ("", command):
        raise OutputError(
            f"{partial}: left by `{other}`, not by `{command}`; choose another --output, or pass --overwrite to discard it"
        )
    if not (overwrite or resume) and any(item.name not in (LOCK_NAME, MARKER_NAME) for item in partial.iterdir()):
        ways = "--overwrite" if resume is None else "--resume to go on or --overwrite"
        raise OutputError(f"{partial}: left over from a run that did not finish; pass {ways} to start anew")
    strange = strange_file(partial)
    if strange is not None:
        raise OutputError(
            f"{partial}: an output is staged there, and {strange} is nothing that sculptor wrote; move it or choose another "
            "--output"
        )


def _check_unlocked(partial: Path) -> None:
    """Whether nobody writes there at the moment; who does is not to be told of left-overs."""
    if (partial / LOCK_NAME).is_file() and not (partial / LOCK_NAME).is_symlink():
        try:
            with FileLock(partial / LOCK_NAME, timeout=0):
                pass
        except Timeout:
            raise _busy(partial) from None


def _busy(partial: Path) -> OutputError:
    return OutputError(f"{partial}: another run is writing there; wait for it or choose another --output")


def _in_the_way(partial: Path) -> str | None:
    """What stands where an output is to be staged, if it is nothing of ours."""
    if partial.is_symlink():
        return f"is a link to {os.readlink(partial)}, and an output is staged in no place but its own"
    if partial.exists() and not partial.is_dir():
        return "is a file, where an output is to be staged"
    if partial.exists() and any(partial.iterdir()) and not (partial / MARKER_NAME).is_file():
        return f"is in the way and not ours (no {MARKER_NAME} in it)"
    return None


def put_in_place(partial: Path, output: Path, *, overwrite: bool) -> None:
    """Puts what is complete in a staging directory's folder `output` in its place, and removes what was of use on the way only.

    Raises:
        NotPlacedError: as `commit` does.
    """
    with signals_wait():  # the output is complete: nothing is left to go on with
        commit(partial / STAGED_NAME, output, overwrite=overwrite)
        discard(partial)


def commit(staged: Path, output: Path, *, overwrite: bool) -> None:
    """Puts a complete staged directory in the place of the output; an old one goes only once the new one is there.

    Args:
        staged: the directory.
        output: its place.
        overwrite: allow an output of ours there.

    Raises:
        NotPlacedError: if that fails; the old output is then where it was, and the new one where it was staged.
    """
    try:
        write_json(staged / MARKER_NAME, {"files": list_files(staged)})
        with signals_wait():
            if output.exists():
                _check_output(output, overwrite=overwrite, resume=False)
                _replace(staged, output)
            else:
                staged.rename(output)
    except (OSError, OutputError) as cause:
        reason = (cause.strerror or str(cause)) if isinstance(cause, OSError) else str(cause)
        raise NotPlacedError(
            f"{output}: cannot be put in place ({reason}); what was there still is, and the new one is complete in {staged}: "
            "move it yourself"
        ) from cause
    with suppress(OSError):  # only now: until here nobody else could take the place; it is complete all the same
        (output / LOCK_NAME).unlink(missing_ok=True)


def _replace(staged: Path, output: Path) -> None:
    make_durable(staged)
    old = Path(tempfile.mkdtemp(prefix=output.name + ".old-", dir=output.parent))
    try:
        output.rename(old / output.name)
    except OSError:
        old.rmdir()
        raise
    try:
        staged.rename(output)
    except OSError:
        (old / output.name).rename(output)
        old.rmdir()
        raise
    if not_ours(old / output.name) is None:  # looked at once more: nobody puts anything there now
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around making a file, or what is in a directory: notes it as ours, and a failure becomes one line that names it."""
    try:
        note(path)
        yield
    except SafetensorError as cause:  # the library reports a full disk as its own error
        raise OutputError(f"{path}: cannot write ({cause}); free some space or choose another place") from cause
    except OSError as cause:
        where = cause.filename or path
        raise OutputError(f"{where}: cannot write ({cause.strerror or cause}); {remedy_of(cause)}") from cause


def move(old: Path, new: Path) -> None:
    """Moves a directory to another place in the same staging directory, where nothing is; what is ours in it stays ours."""
    with writing(new):
        note_moved(old, new)
        old.rename(new)


def move_back(partial: Path, name: str) -> None:
    """Undoes a `move` into the output of a run that could not put that in its place, so that nothing is made twice."""
    moved = partial / STAGED_NAME / name
    if moved.is_dir() and not (partial / name).exists():
        move(moved, partial / name)


def write_json(path: Path, content: dict[str, Any], *, allow_nan: bool = False, indent: int | None = 1) -> None:
    """Writes JSON as `write_bytes` does; without indentation much faster."""
    write_bytes(path, (json.dumps(content, indent=indent, allow_nan=allow_nan) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that it is either the old or the new one, never half of it."""
    with writing(path):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
