"""Which folders of a checkpoint are part of the model: what is written, and what is compared, asks here.

Those that transformers reads by name, further tokenizers of a processor, the modules of sentence-transformers, which
`modules.json` and the routers among them name, and licences; nothing else: neither a trainer's `checkpoint-500`, nor `runs`, nor
another program's copy of the weights.
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
_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_LICENCES = re.compile(r"(licen[cs]e|notice)s?", re.IGNORECASE)
MODULES_NAME, ROUTER_NAME = "modules.json", "router_config.json"
_OF_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


def model_folders(path: Path) -> tuple[PurePosixPath, ...]:
    """All of them, relative to the directory."""
    licences = sorted(name for name in os.listdir(path) if _LICENCES.fullmatch(name)) if path.is_dir() else []
    modules = module_folders(path)
    tokenizers = [folder for folder in _tokenizer_folders(path) if folder not in modules]
    return (*map(PurePosixPath, (*READ_FOLDERS, *licences)), *tokenizers, *modules)


def _tokenizer_folders(path: Path) -> Iterator[PurePosixPath]:
    """Folders of a tokenizer alone, as processors with several save them: a checkpoint beside it makes it another model's."""
    names = _names_in(path)
    for name in names if {*_OF_PROCESSORS} & {*names} else ():
        if name.startswith(".") or name in READ_FOLDERS:
            continue
        inside = set(_names_in(path / name))
        if inside & {*_OF_TOKENIZERS} and not any(each == "config.json" or each.endswith(_WEIGHTS) for each in inside):
            yield PurePosixPath(name)


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
        folder = _inside(path / MODULES_NAME, place)
        routed = _routed(path / folder / ROUTER_NAME)
        for each, kind in routed.items():
            inner = folder / _inside(path / folder / ROUTER_NAME, each)
            if inner.parts:
                yield inner, str(kind).rpartition(".")[2]
        if folder.parts:
            yield folder, str(module.get("type")).rpartition(".")[2]


def _names_in(folder: Path) -> list[str]:
    """Sorted; none of what is no folder, or not readable."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _inside(file: Path, place: Any) -> PurePosixPath:
    folder = PurePosixPath(place) if isinstance(place, str) else PurePosixPath()
    if folder.is_absolute() or any(part.startswith(".") or not part.isprintable() for part in folder.parts):
        raise CheckpointError(f"{file}: a module in {place!r}, hidden or outside of the directory")
    return folder


def is_in(name: str, folders: Collection[PurePosixPath]) -> bool:
    """Whether a file lies in one of some folders."""
    return any(folder in folders for folder in PurePosixPath(name).parents)


def _routed(file: Path) -> dict[str, Any]:
    """The classes of the modules that a router sends to, by folder."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    types = found.get("types") if isinstance(found, dict) else None
    return types if isinstance(types, dict) else {}


def _listed(file: Path) -> list[Any]:
    """What a list of modules holds; a file of that name that is none names nothing."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
