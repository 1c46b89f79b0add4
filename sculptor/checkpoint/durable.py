"""What survives the machine: files that are on the disk, not only on their way there."""

import os
from pathlib import Path


def make_durable(directory: Path) -> None:
    """Waits until what is in a directory survives the machine: before what it stands for is removed."""
    for folder, _, names in os.walk(directory):
        for name in [*names, ""]:
            path = os.path.join(folder, name)
            if os.path.islink(path) or not (os.path.isdir(path) or os.path.isfile(path)):
                continue  # none of ours: a pipe would wait for somebody
            place = os.open(path, os.O_RDONLY)
            try:
                os.fsync(place)
            finally:
                os.close(place)
