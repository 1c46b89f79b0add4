"""What survives the machine: files that are on the disk, not only on their way there."""

import os
from pathlib import Path


def make_durable(directory: Path) -> None:
    """Waits until what is in a directory survives the machine: before what it stands for is removed."""
    for folder, _, names in os.walk(directory):
        for name in [*names, ""]:
            place = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(place)
            finally:
                os.close(place)
