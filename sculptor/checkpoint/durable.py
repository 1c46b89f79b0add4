"""What survives the machine: files that are on the disk, not only on their way there."""

import errno
import os
from pathlib import Path

# What file systems say that cannot wait for a folder.
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def make_durable(directory: Path) -> None:
    """Waits until what is in a directory survives the machine: before what it stands for is removed."""
    for folder, _, names in os.walk(directory):
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isfile(path) and not os.path.islink(path):  # a pipe would wait for somebody
                _wait(path)
        make_names_durable(folder)


def make_names_durable(folder: str | Path) -> None:
    """Waits until the names in a folder survive the machine, where that can be waited for."""
    try:
        _wait(folder)
    except OSError as cause:
        if cause.errno not in _NOT_FOR_FOLDERS:
            raise


def _wait(path: str | Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
