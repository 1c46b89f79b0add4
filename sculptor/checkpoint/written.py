"""What of a directory this program wrote, and what somebody else did, who keeps it.

While an output is made, what is ours is told by its name: every command says which files it writes. A complete output
lists its files with a fingerprint of each, so that a file of the same name with other content is somebody's, too.
"""

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

LOCK_NAME = ".sculptor.lock"
MARKER_NAME = ".sculptor"  # says that a staging directory is ours to empty, and what a finished output is made of
_MARKS = (LOCK_NAME, MARKER_NAME)
# Of no output, but of the way there: may be left where tidying up failed.
_OF_THE_WAY = (*_MARKS, "progress.json", "scores.json")
_WHOLE = 2**20  # bytes up to which a file is read whole; of larger ones, as many pieces
_PIECES = 64


def list_files(staged: Path, writes: Sequence[str]) -> dict[str, str]:
    """Name and fingerprint of everything an output is made of.

    Args:
        staged: where it was made.
        writes: patterns of what was written there; what else came to lie there goes along, and stays somebody else's.
    """
    names = [name for name in _held(staged) if name not in _OF_THE_WAY and _is_written(staged / name, name, writes)]
    return {name: _fingerprint(staged / name) for name in names}


def not_ours(output: Path) -> str | None:
    """Why a directory is no output of this program, or holds something that is not of it; None if neither."""
    if not output.is_dir():
        return "is a file"
    held = sorted(_held(output))
    if not held and not any(output.iterdir()):
        return None
    try:
        known = dict(json.loads((output / MARKER_NAME).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"is no output of sculptor (no list of its files in {MARKER_NAME})"
    for name in held:
        if _is_of_the_way(output / name, name):
            continue
        if name not in known:
            return f"holds {name}, which sculptor did not write"
        if _fingerprint(output / name) != known[name]:
            return f"holds another {name} than sculptor wrote"
    return None


def strange_file(partial: Path, writes: Sequence[str]) -> str | None:
    """The first file in a staging directory that no run of ours writes, None if there is none."""
    return next((name for name in sorted(_held(partial)) if not _is_written(partial / name, name, writes)), None)


def empty(directory: Path, writes: Sequence[str], kept: Sequence[str] = ()) -> None:
    """Removes what is written somewhere, and folders in which nothing is left; lock and marker stay.

    Args:
        directory: where.
        writes: patterns of what is written there.
        kept: names that stay.
    """
    for name in list(_held(directory)):
        if name not in kept and name not in _MARKS and _is_written(directory / name, name, writes):
            (directory / name).unlink()
    for folder, _, _ in os.walk(directory, topdown=False):
        if folder != os.fspath(directory):
            with suppress(OSError):
                os.rmdir(folder)


def discard(partial: Path, writes: Sequence[str]) -> None:
    """Removes what is ours from a staging directory, and the directory unless something else is in it, as far as that goes."""
    with suppress(OSError):
        empty(partial, writes)
        for name in _MARKS:  # last, so that what a killed run leaves is known as ours
            (partial / name).unlink(missing_ok=True)
        partial.rmdir()


def _held(path: Path) -> Iterator[str]:
    """All files and links below a directory."""
    for folder, inner, files in os.walk(path):
        here = Path(folder)
        links = [name for name in inner if (here / name).is_symlink()]
        yield from ((here / name).relative_to(path).as_posix() for name in (*files, *links))


def _is_written(path: Path, name: str, writes: Sequence[str]) -> bool:
    """Whether a run of ours writes a file of this name; it makes no links."""
    plain = name.removesuffix(".tmp")
    return not path.is_symlink() and (
        plain in _MARKS or any(fnmatch.fnmatchcase(each, pattern) for each in (name, plain) for pattern in writes)
    )


def _is_of_the_way(path: Path, name: str) -> bool:
    """Whether a file was left by a run that could not tidy up: people call theirs `scores.json`, too."""
    if name in _MARKS:
        return True
    try:
        return name in _OF_THE_WAY and "key" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _fingerprint(path: Path) -> str:
    """Size and SHA-256 of a file; of a large one, of pieces from its beginning to its end."""
    if path.is_symlink() or not path.is_file():
        return "no file"
    size, found = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _WHOLE:
            found.update(file.read())
        else:
            length = _WHOLE // _PIECES
            for i in range(_PIECES):
                file.seek(i * (size - length) // (_PIECES - 1))
                found.update(file.read(length))
    return f"{size} {found.hexdigest()}"
