"""README.md of an output: the model card that makes it a model to publish.

Its head (YAML, as the hub reads it) names the base, the licence that comes with the base, and data that are on the hub. Names of
what a run read are in it, places are not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from sculptor import __version__
from sculptor.checkpoint.directory import companions, published_name
from sculptor.checkpoint.records import RECORD_NAME
from sculptor.checkpoint.staging import writing
from sculptor.distribution import NAME

README_NAME = "README.md"
PAPER = "https://arxiv.org/abs/2504.07097"
# Of a base's head, what is as true of what was made of it.
_TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
_MAX_BYTES = 2**20
_MAX_NAMES = 3
_HUB_DATA = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:[:@].*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readme:
    """What is told of an output.

    Attributes:
        bases: directories of what it was made of, the first for licence and language.
        done: what was done, the end of the title.
        summary: the same, in a sentence or two.
        tags: beside `sculptor`.
        figures: rows of a table.
        data: names of what it was trained or chosen on; `rows_digest` of all rows.
        check: how to verify it; empty if there is nothing to.
    """

    bases: tuple[Path, ...]
    done: str
    summary: str
    tags: tuple[str, ...]
    figures: Sequence[tuple[str, str]]
    data: tuple[str, ...] = ()
    rows_digest: str | None = None
    check: str = ""


@dataclass(frozen=True, slots=True)
class _Base:
    """What is known of a base: its name, and the head and title of its own card, if it has one that can be read."""

    name: str
    head: Mapping[str, Any]
    title: str
    ours: bool

    @property
    def on_hub(self) -> tuple[str, ...]:
        """What the hub knows it by; an output of ours that lies here is of the bases that its card names."""
        known = self.head.get("base_model") if self.ours else self.name
        return tuple(name for name in (known if isinstance(known, list) else [known]) if is_hub_name(name))


def write_readme(staged: Path, readme: Readme) -> None:
    """Writes README.md into an output, in the place of one that came along with the base.

    Raises:
        OutputError: if it cannot be written.
    """
    bases = [_read_base(path) for path in readme.bases]
    with writing(staged / README_NAME):
        for other in staged.iterdir():
            if other.name.lower() == README_NAME.lower():
                other.unlink()
        (staged / README_NAME).write_text(
            f"---\n{_head(readme, bases)}\n---\n\n{_body(readme, bases)}", encoding="utf-8"
        )


def code(text: str) -> str:
    """A name as Markdown shows it, whatever is in it, also in a table."""
    line = "".join(c if c.isprintable() else " " for c in text).replace("`", "'").replace("|", "¦").strip()
    return f"`{line}`"


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(map(code, names[:_MAX_NAMES])) + more


def _head(readme: Readme, bases: Sequence[_Base]) -> str:
    from huggingface_hub import ModelCardData

    known = list(dict.fromkeys(name for base in bases for name in base.on_hub))
    data = [found[1] for found in map(_HUB_DATA.fullmatch, readme.data) if found and is_hub_name(found[1])]
    licences = {str(base.head.get("license_name") or base.head.get("license")) for base in bases}
    keys = [key for key in _TAKEN_OVER if len(licences) == 1 or not key.startswith("license")]
    taken = {key: bases[0].head[key] for key in keys if _is_plain(bases[0].head.get(key))}
    head: str = ModelCardData(
        base_model=known[0] if len(known) == 1 else known or None,
        library_name="transformers",
        datasets=list(dict.fromkeys(data)) or None,
        tags=["sculptor", *readme.tags],
        **taken,
    ).to_yaml()
    return head


def _body(readme: Readme, bases: Sequence[_Base]) -> str:
    parts = [
        f"# {code(bases[0].name)}, {readme.done}",
        readme.summary,
        "\n".join(map(_base_line, bases)),
        f"Made by sculptor {__version__} (`{NAME}`), after [Sculpting Subspaces]({PAPER}). It is a plain Hugging Face "
        f"checkpoint and loads like {code(bases[0].name)}. Settings, versions and digests are in `{RECORD_NAME}`.",
        f"## Figures\n\n{_table(readme.figures)}",
    ]
    if readme.data:
        digest = "" if readme.rows_digest is None else f"\n\nSHA-256 of all rows: `{readme.rows_digest}`"
        parts.append("## Data\n\n" + "\n".join(f"* {code(name)}" for name in readme.data) + digest)
    if readme.check:
        parts.append(f"## Verify\n\n{readme.check}")
    return "\n\n".join(parts) + "\n"


def _base_line(base: _Base) -> str:
    licence = base.head.get("license_name") or base.head.get("license")
    said = f"licence {code(licence)}" if isinstance(licence, str) else "its card names no licence: look there"
    title = f", {code(base.title)}" if base.title and base.title != base.name else ""
    return f"* Made from {code(base.name)}{title}: {said}."


def _table(figures: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures)])


def _read_base(path: Path) -> _Base:
    """A card that nobody can read is none: it is text for people, and may be anything."""
    from huggingface_hub import metadata_load

    ours, name = (path / RECORD_NAME).is_file(), published_name(path)
    file = path / README_NAME
    carried = any(item.as_posix() == README_NAME for item in companions(path))
    if not carried or file.stat().st_size > _MAX_BYTES:
        return _Base(name, {}, "", ours)
    try:
        text = file.read_text(encoding="utf-8-sig")
        head = metadata_load(file) or {}
    except Exception:  # of YAML, a dozen kinds
        return _Base(name, {}, "", ours)
    title = re.search(r"^# +(.+)$", text.partition("\n---")[2] if head else text, re.MULTILINE)
    return _Base(name, head, title[1].replace("`", "").strip()[:100] if title else "", ours)


def _is_plain(value: Any) -> bool:
    """Whether a value of a head is a line of text, or some, and none a place on somebody's machine."""
    values = value if isinstance(value, list) and value else [value]
    return all(
        isinstance(item, str) and item.isprintable() and len(item) <= 200 and not item.startswith(("/", "~", "file:"))
        for item in values
    )


def is_hub_name(name: object) -> TypeGuard[str]:
    """Whether the hub could have a repository of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None
