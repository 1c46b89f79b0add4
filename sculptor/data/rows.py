"""Data as they are given, a name, a `Dataset` or any iterable of dicts, to rows; the one way for everything that takes rows."""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sculptor.data.columns import Columns, parse_columns
from sculptor.data.files import Found, check_regular, is_parquet, read_file_rows
from sculptor.data.forms import EXPECTED, listed_keys, recognise
from sculptor.data.labelled import EXPECTED_LABELLED, Classes
from sculptor.data.reference import TABLE_ENDINGS, TEXT_ENDINGS, Reference, parse_reference
from sculptor.data.row_types import CompletionRow, MessagesRow, Row, TextRow, digest_rows, settle
from sculptor.data.tables import choose_split, dataset_rows, read_table_rows
from sculptor.errors import DataError, SettingsError

__all__ = [
    "CompletionRow", "Data", "DataSource", "Item", "MessagesRow", "Row", "TextRow", "as_items", "check_weights", "digest_rows",
    "given_twice", "local_files", "names_of", "read_rows", "read_sources", "settle", "task_name", "to_read_again", "unweighted",
    "weight_of",
]  # fmt: skip

# A name (`PLACE[:CONFIG][@SPLIT][:WEIGHT]`), a Dataset, an iterable of dicts, or one of these with its weight.
Item = str | Path | Iterable[Mapping[str, Any]] | tuple[Any, float]
Data = Item | Sequence[Item]
Notice = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class DataSource:
    """What one of several data came to.

    Attributes:
        name: for messages and records.
        rows: those that are trained.
        weight: relative share of the rows of an epoch; None if the rows are simply put together.
        forms: how many rows had which form; `recognised` those forms that are not our own.
        num_off: rows that say that they are not trained.
        unread: keys that nothing looks at, and how many rows have each.
    """

    name: str
    rows: tuple[Row, ...]
    weight: float | None
    forms: Mapping[str, int]
    recognised: tuple[str, ...]
    num_off: int
    unread: Mapping[str, int]

    @property
    def says(self) -> str | None:
        """A line on what was decided about it; None if there was nothing to decide."""
        parts = [f"{self.forms[form]:,} rows read as {form}" for form in self.recognised]
        if self.unread:
            parts.append(f"not read: {listed_keys(self.unread)}")
        if self.num_off:
            parts.append(f"{self.num_off:,} rows left out by their own weight")
        return f"{self.name}: {'; '.join(parts)}" if parts else None


def read_rows(
    data: Data,
    max_rows: int | None = None,
    columns: str | Columns | None = None,
    notice: Notice = lambda _: None,
    *,
    all_renamed: bool = True,
    classes: Classes | None = None,
) -> list[Row]:
    """All rows, in order; as `read_sources`, of data that have no weights.

    Raises:
        DataError: as `read_sources`.
        SettingsError: for weights, which would have no effect.
    """
    sources = read_sources(data, max_rows, columns, notice, all_renamed=all_renamed, classes=classes)
    weighted = next((source for source in sources if source.weight is not None), None)
    if weighted is not None:
        raise SettingsError(f"{weighted.name}:{weighted.weight:g}: a weight without effect here; leave it out")
    return [row for source in sources for row in source.rows]


def read_sources(
    data: Data,
    max_rows: int | None = None,
    columns: str | Columns | None = None,
    notice: Notice = lambda _: None,
    *,
    mixed: bool = False,
    all_renamed: bool = True,
    classes: Classes | None = None,
) -> list[DataSource]:
    """Reads rows of any form, each of the data by itself.

    Args:
        data: one or several of: files, folders, hub names; a `Dataset` or any iterable of dicts; pairs with a weight.
        max_rows: of each, the first ones; no more are read.
        columns: our keys and their columns, `prompt=question,completion=answer` or a mapping.
        notice: told, in a line for each, what form was recognised.
        mixed: there are further data beside these, so that the weight of one has an effect.
        all_renamed: refuse columns that no row has.
        classes: take every row as text and label, for these classes.

    Raises:
        DataError: with file and line number, for a row that is broken, empty, of unknown keys or of several forms.
        SettingsError: for columns that no row has, and weights that mix nothing.
    """
    named = parse_columns(columns)
    opened = [_open(item) for item in as_items(data)]
    if not mixed:
        _check_weights(opened)
    seen: set[str] = set()
    sources = [_read(item, max_rows, named, seen, classes) for item in opened]
    if all_renamed and opened and named and not seen & set(named.values()):
        raise SettingsError(f"--columns without effect: no row has {' or '.join(map(repr, named.values()))}")
    for source in sources:
        if source.says is not None:
            notice(source.says)
    return sources


def check_weights(data: Data) -> list[float] | None:
    """The weights of all data; None if there are none.

    Raises:
        SettingsError: if some have weights and some have none, or one alone has.
    """
    opened = [_open(item) for item in as_items(data)]
    _check_weights(opened)
    weights = [item.weight for item in opened if item.weight is not None]
    return weights or None


def weight_of(item: Item) -> float | None:
    """The weight that one of the data is given with."""
    return _open(item).weight


def unweighted(item: str) -> str:
    """What data are called without the weight that they are given with."""
    opened = _open(item)
    return item if opened.reference is None else opened.reference.text


def given_twice(data: Data) -> str | None:
    """What is there twice among the data, whatever its weight or the way to it; None if nothing is."""
    seen = set[tuple[str, str | None, str | None]]()
    for item in as_items(data):
        reference = _open(item).reference
        if reference is None:
            continue
        key = (
            os.path.realpath(reference.place) if reference.is_local else reference.place,
            reference.config,
            reference.split,
        )
        if key in seen:
            return reference.text
        seen.add(key)
    return None


def as_items(data: Data) -> list[Item]:
    """Data as a list, whether one or several are given."""
    if not isinstance(data, list | tuple) or _is_weighted(data):
        return [data]  # type: ignore[list-item]
    if data and isinstance(data[0], Mapping) and not _has_splits(data[0]):
        return [data]  # rows themselves
    return list(data)


def to_read_again(data: Data, max_rows: int | None = None) -> list[Item]:
    """Data as a list, of which nothing is used up by being read; no more rows of each are read than are wanted."""
    return [_kept(item, max_rows) for item in as_items(data)]


def _kept(item: Any, max_rows: int | None) -> Item:
    if _is_weighted(item):
        return _kept(item[0], max_rows), item[1]
    return list(itertools.islice(item, max_rows)) if isinstance(item, Iterator) else item


def names_of(data: Data) -> tuple[str, ...]:
    """What records call data: files without their folders."""
    return tuple(_open(item).published for item in as_items(data))


def task_name(item: Item) -> str:
    """What a task is called that is trained on these data: after the file, or its folder where the file is one of many."""
    opened = _open(item)
    if opened.reference is None:
        return opened.name
    path = opened.reference.path
    return path.stem if path.stem != "train" else path.resolve().parent.name


def local_files(data: Data) -> list[str]:
    """Files and folders among the data."""
    references = (_open(item).reference for item in as_items(data))
    return [reference.place for reference in references if reference is not None and reference.is_local]


@dataclass(frozen=True, slots=True)
class _Opened:
    name: str
    weight: float | None
    reference: Reference | None = None
    given: Any = field(default=None, repr=False)

    @property
    def published(self) -> str:
        return self.name if self.reference is None else self.reference.name

    def rows(self, bounded: bool) -> Found:
        """Every row, and where it stands."""
        if self.reference is None:
            return dataset_rows(self.given, self.name)
        return _rows_of(self.reference, bounded)


def _is_weighted(item: Any) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[1], int | float)
        and not isinstance(item[1], bool)
    )


def _has_splits(item: Mapping[str, Any]) -> bool:
    """Whether this is a `DatasetDict`, and not a row."""
    return bool(item) and all(hasattr(value, "features") for value in item.values())


def _is_frame(item: Any) -> bool:
    """Whether this is a table of pandas or polars, of which one is given names of columns where rows are asked for."""
    return hasattr(item, "columns") and (hasattr(item, "iterrows") or hasattr(item, "iter_rows"))


def _open(item: Any) -> _Opened:
    weight = None
    if _is_weighted(item):
        item, weight = item[0], float(item[1])
        if not 0 < weight < 1e9:
            raise DataError(f"a weight of {weight:g}; expected more than 0")
    if isinstance(item, str | Path):
        reference = parse_reference(str(item))
        return _Opened(reference.text, weight if weight is not None else reference.weight, reference)
    if isinstance(item, Mapping) and _has_splits(item):
        item = choose_split(item, type(item).__name__)
    if not isinstance(item, Iterable) or isinstance(item, Mapping) or _is_frame(item):
        remedy = "; of columns make rows: Dataset.from_dict(...)" if isinstance(item, Mapping) else ""
        remedy = "; of a frame make rows: frame.to_dict('records')" if _is_frame(item) else remedy
        raise DataError(
            f"data are of type {type(item).__name__}; expected a file, a Dataset or an iterable of dicts{remedy}"
        )
    split = getattr(item, "split", None)
    dataset = getattr(getattr(item, "info", None), "dataset_name", None)
    name = f"{dataset or type(item).__name__}{f'@{split}' if split else ''}"
    return _Opened(name, weight, None, item)


def _rows_of(reference: Reference, bounded: bool) -> Found:
    path, ending = reference.path, reference.path.suffix.lower()
    check_regular(path)
    whole = reference.config is None and reference.split is None
    if ending in TABLE_ENDINGS and reference.is_local and not path.is_dir():
        return read_table_rows(reference, ending[1:], bounded)
    if reference.is_hub_name or os.path.isdir(reference.place):
        return read_table_rows(reference, None, bounded)
    if whole and ending not in TEXT_ENDINGS and is_parquet(path):
        return read_table_rows(reference, "parquet", bounded)
    if not whole:
        what = "is one file, without configs or splits" if reference.is_local else "no such data file or folder"
        raise DataError(f"{reference.text}: {what}")
    if not reference.is_local and ending not in (*TEXT_ENDINGS, *TABLE_ENDINGS):
        raise DataError(f"{reference.text}: no such data file or folder; a hub name is OWNER/NAME or NAME@SPLIT")
    return read_file_rows(path)


def _read(item: _Opened, max_rows: int | None, columns: Columns, seen: set[str], classes: Classes | None) -> DataSource:
    rows: list[Row] = []
    forms: Counter[str] = Counter()
    recognised: dict[str, None] = {}
    unread: Counter[str] = Counter()
    num_off = 0
    wanted = set(columns.values())
    for where, given in itertools.islice(item.rows(max_rows is not None), max_rows):
        found = recognise(given, where, columns, classes)
        seen |= wanted & given.keys()
        unread.update(found.unread)
        if found.row is None:
            num_off += 1
            continue
        rows.append(found.row)
        forms[found.form] += 1
        if not found.is_ours:
            recognised[found.form] = None
    if not rows:
        left = f"; {num_off} are left out by their own weight" if num_off else ""
        expected = EXPECTED if classes is None else EXPECTED_LABELLED
        raise DataError(f"{item.name}: no rows{left}; expected {expected}")
    return DataSource(
        item.published, tuple(rows), item.weight, dict(forms), tuple(recognised), num_off, dict(sorted(unread.items()))
    )


def _check_weights(opened: Sequence[_Opened]) -> None:
    weighted = [item for item in opened if item.weight is not None]
    if not weighted:
        return
    if len(opened) == 1:
        raise SettingsError(
            f"{opened[0].name}:{opened[0].weight:g}: a weight without effect: it mixes several data; --max-rows takes a part"
        )
    if len(weighted) < len(opened):
        bare = next(item.name for item in opened if item.weight is None)
        raise SettingsError(f"{bare} has no weight, {weighted[0].name} has one; give all data weights, or none")
