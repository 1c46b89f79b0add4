"""Which folders of a checkpoint are part of the model: what is written, and what is compared, asks here.

Those that transformers reads by name, the modules of sentence-transformers, which `modules.json` names, and licences; nothing
else: neither a trainer's `checkpoint-500`, nor `runs`, nor another program's copy of the weights.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sculptor.errors import CheckpointError

TEMPLATES = "additional_chat_templates"
READ_FOLDERS = (TEMPLATES, "custom_generate")  # by transformers, whatever else they hold
_LICENCES = re.compile(r"(licen[cs]e|notice)s?", re.IGNORECASE)
MODULES_NAME = "modules.json"


def model_folders(path: Path) -> tuple[PurePosixPath, ...]:
    """All of them, relative to the directory."""
    licences = sorted(name for name in os.listdir(path) if _LICENCES.fullmatch(name)) if path.is_dir() else []
    return (*map(PurePosixPath, (*READ_FOLDERS, *licences)), *module_folders(path))


def module_folders(path: Path) -> tuple[PurePosixPath, ...]:
    """Folders of modules, which have weights of their own; none of them is in another.

    Raises:
        CheckpointError: if one is said to be elsewhere.
    """
    named = {folder for folder, _ in named_modules(path)}
    return tuple(sorted(folder for folder in named if not named & set(folder.parents)))


def named_modules(path: Path) -> Iterator[tuple[PurePosixPath, str]]:
    """The folder of each module that has one, and its class.

    Raises:
        CheckpointError: if one is said to be elsewhere.
    """
    for module in _listed(path / MODULES_NAME):
        place = module.get("path") if isinstance(module, dict) else None
        folder = PurePosixPath(place) if isinstance(place, str) else PurePosixPath()
        if folder.is_absolute() or any(part.startswith(".") or not part.isprintable() for part in folder.parts):
            raise CheckpointError(f"{path / MODULES_NAME}: a module in {place!r}, hidden or outside of the directory")
        if folder.parts:
            yield folder, str(module.get("type")).rpartition(".")[2]


def is_in(name: str, folders: Collection[PurePosixPath]) -> bool:
    """Whether a file lies in one of some folders."""
    return any(folder in folders for folder in PurePosixPath(name).parents)


def _listed(file: Path) -> list[Any]:
    """What a list of modules holds; a file of that name that is none names nothing."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
