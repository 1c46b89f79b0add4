"""What a processor of several kinds of input is once transformers has loaded it: its files have had several forms."""

from pathlib import Path
from typing import Any

from sculptor.checkpoint.plain import read_plain

TEMPLATE_FILE = "chat_template.json"
_WITH_TEMPLATES = (TEMPLATE_FILE, "processor_config.json")  # which other programs read templates from
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    TEMPLATE_FILE,
)
_PARTS = ("image_processor", "video_processor", "feature_extractor", "audio_processor")


def same_processor(base: Path, other: Path) -> bool:
    """Whether transformers loads the same processor from two directories, its tokenizers aside; False if it loads none.

    A template in a file has to be the one that is loaded: other programs read it where transformers does not.
    """
    from transformers import AutoProcessor

    try:
        first, second = (
            AutoProcessor.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            for path in (base, other)
        )
        loaded = getattr(second, "chat_template", None)
        for name in _WITH_TEMPLATES:
            told, before = other / name, base / name
            if not told.is_file() or (before.is_file() and before.read_bytes() == told.read_bytes()):
                continue
            content = read_plain(told.read_bytes())
            if (name == TEMPLATE_FILE or "chat_template" in content) and content["chat_template"] != loaded:
                return False
        return _facts(first) == _facts(second)
    except Exception:  # it raises what it likes, and may want libraries that are not here
        return False


def _facts(processor: Any) -> list[Any]:
    parts = [processor, *(getattr(processor, name, None) for name in _PARTS)]
    said = [part.to_dict() if hasattr(part, "to_dict") else None for part in parts]
    return [type(processor).__name__, getattr(processor, "chat_template", None), *map(_plain, said)]


def _plain(value: Any) -> Any:
    """Settings alone: not where they lay."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key not in ("name_or_path", "_name_or_path")}
    return value if isinstance(value, bool | int | float | list | None) else str(value)
