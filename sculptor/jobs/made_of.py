"""What an archive in a training's staging directory was made of, noted beside it until the output is complete."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sculptor.archive.store import MANIFEST_NAME
from sculptor.checkpoint.run_keys import key_difference
from sculptor.checkpoint.staging import write_json
from sculptor.errors import OutputError
from sculptor.validation import parse, read_file

REMEDY = "pass --overwrite to start anew"


def check_made_of(staged: Path, name: str, now: Mapping[str, Any], other: str) -> None:
    """Refuses a complete archive that was made of something else, and notes what this run makes it of.

    One that is only begun looks by itself (`ArchiveWriter.resume`).

    Args:
        staged: the staging directory.
        name: of the archive's directory in it.
        now: what it has to be made of.
        other: how a message begins what differs.

    Raises:
        OutputError: naming what differs.
    """
    made_of: dict[str, Any] = json.loads(json.dumps(now))  # as files have it
    noted, path = staged / f"{name}_of.json", staged / name
    if noted.is_file() and (path / MANIFEST_NAME).is_file():
        different = key_difference(parse(read_file(noted, OutputError, REMEDY), noted, OutputError, REMEDY), made_of)
        if different is not None:
            raise OutputError(f"{path}: {other} ({different}); {REMEDY}")
    write_json(noted, made_of)
