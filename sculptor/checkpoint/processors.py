"""What a processor of several kinds of input is once transformers has loaded it: its files have had several forms."""

from pathlib import Path
from typing import Any

from sculptor.checkpoint.plain import read_plain

TEMPLATE_FILE = "chat_template.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    TEMPLATE_FILE,
)
_PARTS = ("image_processor", "video_processor", "feature_extractor", "audio_processor")


def same_processor(base: Path, other: Path) -> bool:
    """Whether transformers loads the same processor from two directories, its tokenizers aside; False if it loads none.

    A file of a template has to say what is loaded: other programs read it where transformers does not.
    """
    from transformers import AutoProcessor

    try:
        first, second = (
            AutoProcessor.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            for path in (base, other)
        )
        told, before = ((path / TEMPLATE_FILE) for path in (other, base))
        new = told.is_file() and not (before.is_file() and before.read_bytes() == told.read_bytes())
        if new and read_plain(told.read_bytes())["chat_template"] != getattr(second, "chat_template", None):
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
