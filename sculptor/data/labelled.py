"""Rows for sequence classification: a text, or two, and the name of a class."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sculptor.checkpoint.architecture import Architecture
from sculptor.data.conversations import short
from sculptor.data.row_types import LabelledRow, Row
from sculptor.errors import DataError

EXPECTED_LABELLED = "'text' and 'label', with 'text_pair' for pairs"
KEYS = ("text", "text_pair", "label")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_LISTED = 8  # classes that a message names
# Columns that people have for a text, or two.
_USUAL = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("sentence",),
    ("content",),
)


@dataclass(frozen=True, slots=True)
class Classes:
    """Asks for labelled rows.

    Attributes:
        names: of the classes by number; none if the rows are to tell.
        needed: whether rows without a label are refused.
    """

    names: tuple[str, ...] = ()
    needed: bool = True


def classes_of(architecture: Architecture, needed: bool = True) -> Classes | None:
    """What rows of a classifier have to be; None for other models."""
    return Classes(architecture.classes, needed) if architecture.kind == "classifier" else None


def labelled(row: Mapping[str, Any], where: str, classes: Classes) -> LabelledRow:
    """A row of text and label.

    Raises:
        DataError: if it has none, or a label that is none of the classes.
    """
    texts = [row[key] for key in KEYS[:2] if key in row]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: a text is {short(text)}; expected words")
    name = _name(row["label"], where, classes.names) if "label" in row else None
    if name is None and classes.needed:
        raise DataError(f"{where}: no 'label'; expected {EXPECTED_LABELLED}{usual_columns(row)}")
    stored = getattr(row.get("label"), "number", None)
    index = _number(name, stored, classes.names, where) if name is not None and classes.names else None
    return LabelledRow(where, texts[0], texts[1] if len(texts) > 1 else None, name, index)


def _name(given: Any, where: str, names: tuple[str, ...]) -> str:
    if isinstance(given, int | float) and not isinstance(given, bool):
        called = next((name for name in names if _is_number(name) and float(name) == given), None)
        if called is not None:
            return called
    if isinstance(given, float) and given.is_integer():  # as tables with an empty cell have whole numbers
        given = int(given)
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, int) or (isinstance(given, str) and given.strip()):
        return str(given).strip()
    what = "a score; sculptor trains classes" if isinstance(given, float) else "no name of one class"
    raise DataError(f"{where}: 'label' is {short(given)}, {what}; expected a text or a whole number")


def _number(name: str, stored: int | None, names: tuple[str, ...], where: str) -> int:
    """Which class a label means: by name, or by number where no class is called by one, so that all labels are read alike.

    A table that has numbers, with digits for their names, means its numbers.
    """
    if name in names:
        return names.index(name)
    numbered = any(_is_number(each) for each in names)
    if name.isascii() and name.isdigit() and not numbered:
        number = int(name) if stored is None else stored
        if number < len(names):
            return number
    raise DataError(f"{where}: 'label' is {short(name)}; the classes of the model are {listed_classes(names)}")


def _is_number(name: str) -> bool:
    return bool(_NUMBER.fullmatch(name))


def class_names(rows: Iterable[Row]) -> tuple[str, ...]:
    """The labels of some rows in the order of their numbers: whole numbers by size, all others by name.

    Raises:
        DataError: if there are fewer than two.
    """
    read = [row for row in rows if isinstance(row, LabelledRow)]
    found = {row.label for row in read if row.label is not None}
    if len(found) < 2:
        where = read[0].where if read else "data"
        raise DataError(
            f"{where}: every row has the label {short(next(iter(found), None))}; a classifier needs two or more"
        )
    numbers = all(name.isascii() and name.removeprefix("-").isdigit() for name in found)
    return tuple(sorted(found, key=lambda name: (int(name) if numbers else 0, name)))


def listed_classes(names: Iterable[str]) -> str:
    """The first of some classes."""
    names = [short(name) for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def usual_columns(row: Mapping[str, Any]) -> str:
    """What would name the columns of somebody's labelled rows."""
    texts = next((columns for columns in _USUAL if all(column in row for column in columns)), ())
    label = next((key for key in ("label", "labels", "class", "category", "gold_label") if key in row), None)
    pairs = [f"{ours}={theirs}" for ours, theirs in zip(KEYS, texts, strict=False)]
    pairs += [f"label={label}"] if label not in (None, "label") else []
    return f"; try --columns {','.join(pairs)}" if pairs else ""
