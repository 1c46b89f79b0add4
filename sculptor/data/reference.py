"""How data are named: `PLACE[:CONFIG][@SPLIT][:WEIGHT]`, where a place is a file, a folder or a hub name."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from sculptor.errors import DataError

_WEIGHT = re.compile(r":(\d+(?:\.\d*)?|\.\d+)$")
_SPLIT = re.compile(r"@([^@/\\]+)$")
_CONFIG = re.compile(r":([^:@/\\]+)$")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Endings of files: what has one is never taken for a hub name.
TEXT_ENDINGS = (".txt", ".jsonl", ".json", ".ndjson", ".csv", ".tsv")
TABLE_ENDINGS = (".parquet", ".arrow")
PACKED_ENDINGS = (".gz", ".zst", ".zip", ".xz", ".bz2")


@dataclass(frozen=True, slots=True)
class Reference:
    """Where data are.

    Attributes:
        text: as it was written, without a weight.
        place: a file, a folder or a hub name.
        config: of a hub name or a folder of several data sets.
        split: of a hub name or a folder of several.
        weight: relative share of the rows of an epoch.
    """

    text: str
    place: str
    config: str | None = None
    split: str | None = None
    weight: float | None = None

    @property
    def path(self) -> Path:
        """The place as a path."""
        return Path(self.place)

    @property
    def is_local(self) -> bool:
        """Whether it is there, as a file or a folder."""
        return os.path.exists(self.place)  # unlike Path.exists, of any name

    @property
    def is_hub_name(self) -> bool:
        """Whether it can be the name of a data set on the hub: OWNER/NAME, or NAME with a config or a split."""
        ending = Path(self.place).suffix.lower()
        if self.is_local or ending in (*TEXT_ENDINGS, *TABLE_ENDINGS, *PACKED_ENDINGS):
            return False
        found = _HUB_NAME.fullmatch(self.place)
        return bool(found and not self.place.startswith(".") and (found[1] or self.config or self.split))

    @property
    def name(self) -> str:
        """What is published of it: the name of a file or folder without those above it, a hub name as it is."""
        return self.text if self.is_hub_name else Path(self.place).name + self.text[len(self.place) :]


def parse_reference(text: str) -> Reference:
    """Takes apart how data are named; what exists under the whole name is that.

    Raises:
        DataError: for a weight that is no share.
    """
    found = Reference(text, text)
    if found.is_local:
        return found
    if weight := _WEIGHT.search(text):
        if not 0 < float(weight[1]) < 1e9:
            raise DataError(f"{text}: a weight of {weight[1]}; expected more than 0")
        text = text[: weight.start()]
        found = Reference(text, text, weight=float(weight[1]))
        if found.is_local:
            return found
    rest = text
    if split := _SPLIT.search(rest):
        rest = rest[: split.start()]
        found = replace(found, place=rest, split=split[1])
    if not found.is_local and (config := _CONFIG.search(rest)):
        found = replace(found, place=rest[: config.start()], config=config[1])
    return found


def locate(text: str, folder: Path) -> str:
    """A name as written in a file of `folder`: relative paths seen from there, everything else as it is."""
    for candidate in (text, *(_without_suffixes(text))):
        if os.path.exists(folder / candidate):
            return f"{folder / candidate}{text[len(candidate) :]}"
    return text


def _without_suffixes(text: str) -> list[str]:
    shorter = []
    for pattern in (_WEIGHT, _SPLIT, _CONFIG):
        if found := pattern.search(text):
            text = text[: found.start()]
            shorter.append(text)
    return shorter
