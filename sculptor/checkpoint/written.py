"""What of a directory this program wrote, and what somebody else did, who keeps it.

While an output is made, each of its files is noted in the marker of the staging directory before it is written. A complete
output lists its files with a fingerprint of each, so that a file of the same name with other content is somebody's, too.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath

STAGED_SUFFIX = ".partial"  # of a staging directory
LOCK_NAME = ".sculptor.lock"
MARKER_NAME = (
    ".sculptor"  # says that a staging directory is ours, and what in it is; and what a finished output is made of
)
_MARKS = (LOCK_NAME, MARKER_NAME)
# Of no output, but of the way there: may be left where tidying up failed.
_OF_THE_WAY = (*_MARKS, "progress.json")
_OF_PROGRESS = {"key", "shards", "records", "tensors"}  # keys of progress.json, as `archive/writer.py` writes it
_WHOLE = 2**20  # bytes up to which a file is read whole; of larger ones, as many pieces
_PIECES = 64
_NOTED: set[Path] = set()  # of the runs of this process

# A directory with a marker, and what that lists: names, with fingerprints in a finished output.
_Listing = tuple[Path, Mapping[str, str | None]]


def begin(partial: Path, command: str) -> None:
    """Marks a staging directory as that of a command; what its marker lists stays listed."""
    listed = _listed(partial)
    _NOTED.clear()  # somebody may have removed them since
    temporary = partial / f"{MARKER_NAME}.tmp"
    temporary.write_text("\n".join([command, *map(json.dumps, listed), ""]), encoding="utf-8")
    os.replace(temporary, partial / MARKER_NAME)


def begun_by(partial: Path) -> str:
    """The command that a staging directory is of; empty if its marker does not tell, as that of a complete output."""
    with suppress(OSError, UnicodeDecodeError):
        command = (partial / MARKER_NAME).read_text(encoding="utf-8").partition("\n")[0]
        return "" if command.startswith("{") else command
    return ""


def note(path: Path) -> None:
    """Lists a file, or a directory with a list of its own, in the staging directory that it is about to be made in."""
    if path in _NOTED:
        return
    for place in path.parents:
        if place.name.endswith(STAGED_SUFFIX) and (place / MARKER_NAME).is_file():
            with open(place / MARKER_NAME, "a", encoding="utf-8") as marker:
                # A line of its own, also behind one that a full disk cut off.
                marker.write(f"\n{json.dumps(path.relative_to(place).as_posix())}\n")
            break
    _NOTED.add(path)


def note_moved(old: Path, new: Path) -> None:
    """Lists what is about to be moved inside a staging directory, with all in it that is ours, under its new name."""
    note(new)
    if not (old / MARKER_NAME).is_file():  # else it has a list of its own
        for path, ours in _sort(old):
            if ours:
                note(new / path.relative_to(old))


def list_files(staged: Path) -> dict[str, str]:
    """Name and fingerprint of everything in a staged directory that is ours; what else came to lie there goes along."""
    names = [path.relative_to(staged).as_posix() for path, ours in _sort(staged) if ours]
    return {name: fingerprint(staged / name) for name in sorted(names) if name not in _OF_THE_WAY}


def not_ours(output: Path) -> str | None:
    """Why a directory is no output of this program, or holds something that is not of it; None if neither."""
    if not output.is_dir():
        return "is a file"
    held = sorted(path.relative_to(output).as_posix() for path in _held(output))
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
        if fingerprint(output / name) != known[name]:
            return f"holds another {name} than sculptor wrote"
    return None


def strange_file(partial: Path) -> str | None:
    """The first file in a staging directory that is not ours, None if there is none."""
    return min((path.relative_to(partial).as_posix() for path, ours in _sort(partial) if not ours), default=None)


def empty(directory: Path, kept: Sequence[str] = ()) -> None:
    """Removes what is ours from a staging directory, or from one in it, and folders in which nothing is left.

    Args:
        directory: where; its own marks stay.
        kept: names that stay.
    """
    stays = {directory / name for name in (*_MARKS, *kept)}
    found = [path for path, ours in _sort(directory) if ours and path not in stays]
    for path in sorted(found, key=lambda path: path.name in _MARKS):  # what a killed run leaves has to be known as ours
        path.unlink()
    for folder, _, _ in os.walk(directory, topdown=False):
        if folder != os.fspath(directory):
            with suppress(OSError):
                os.rmdir(folder)


def remove(directory: Path) -> None:
    """Removes a directory in a staging directory, as far as it is ours."""
    with suppress(OSError):
        empty(directory)
        held = {path for path in _held(directory) if path.parent != directory or path.name not in _MARKS}
        if not held and any(path.is_dir() for path in directory.iterdir()):
            return  # a folder would not go, and has to be known as ours
        for name in _MARKS:
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


def discard(partial: Path) -> None:
    """Removes what is ours from a staging directory, and the directory unless something else is in it, as far as that goes."""
    remove(partial)


def fingerprint(path: Path) -> str:
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


def _listed(place: Path) -> dict[str, str | None]:
    """What a marker lists; nothing, if it cannot be read."""
    try:
        text = (place / MARKER_NAME).read_text(encoding="utf-8")
        if text.startswith("{"):
            return {str(name): str(found) for name, found in json.loads(text)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    found: dict[str, str | None] = {}
    for line in text.split("\n")[1:-1]:
        with suppress(ValueError, TypeError):  # cut off
            found[_plain(json.loads(line))] = None
    return found


def _plain(name: str) -> str:
    """The name that a file, or a folder on the way to it, has once it is complete."""
    return "/".join(part.removesuffix(".tmp") for part in PurePath(name).parts)


def _held(path: Path) -> Iterator[Path]:
    """All files and links below a directory."""
    for folder, inner, files in os.walk(path):
        here = Path(folder)
        yield from (here / name for name in files)
        yield from (here / name for name in inner if (here / name).is_symlink())


def _sort(directory: Path) -> Iterator[tuple[Path, bool]]:
    """All files and links below a directory that is staged or in one that is, and whether they are ours."""
    around = [place for place in (directory, *directory.parents) if place.name.endswith(STAGED_SUFFIX)]
    return _sort_folder(directory, [(place, _listed(place)) for place in around])


def _sort_folder(folder: Path, listings: Sequence[_Listing]) -> Iterator[tuple[Path, bool]]:
    if _is_listed(folder, listings):  # it may have a list of its own
        listings = [(folder, _listed(folder)), *listings]
    for item in folder.iterdir() if folder.is_dir() else ():
        if item.is_dir() and not item.is_symlink():
            yield from _sort_folder(item, listings)
        else:
            yield item, _is_ours(item, listings)


def _is_ours(path: Path, listings: Sequence[_Listing]) -> bool:
    """Whether a file is listed, or is what there is a list in; we make no links."""
    if path.is_symlink() or not path.is_file():
        return False
    marks = any(path.parent == place and _is_of_the_way(path, _plain(path.name)) for place, _ in listings)
    return marks or _is_listed(path, listings)


def _is_listed(path: Path, listings: Sequence[_Listing]) -> bool:
    for place, listed in listings:
        if path.is_relative_to(place):
            name = _plain(path.relative_to(place).as_posix())
            if name in listed and listed[name] in (None, fingerprint(path)):
                return True
    return False


def _is_of_the_way(path: Path, name: str) -> bool:
    """Whether a file was left by a run that could not tidy up: people call theirs `progress.json`, too."""
    if name in _MARKS:
        return True
    try:
        return name in _OF_THE_WAY and set(json.loads(path.read_bytes())) == _OF_PROGRESS
    except (OSError, ValueError, TypeError, RecursionError):
        return False
