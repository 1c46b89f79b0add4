"""Rows through the `datasets` library (extra `data`): hub names, saved datasets, folders, Parquet and Arrow files.

Rows are read one after another as they are asked for: files here are never copied to a cache, and of a hub name no more is
fetched than the rows that are asked for, if their number is given.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sculptor.data.columns import Cells
from sculptor.data.files import Found, read_file_rows
from sculptor.data.reference import TABLE_ENDINGS, TEXT_ENDINGS, Reference
from sculptor.distribution import extra
from sculptor.errors import DataError

_FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow"}
_SAVED = ("state.json", "dataset_dict.json")


def read_table_rows(reference: Reference, kind: str | None, bounded: bool) -> Found:
    """Every row, and where it stands.

    Args:
        reference: a file of a kind, a folder or a hub name.
        kind: parquet or arrow, of a file.
        bounded: only the first rows will be asked for.

    Raises:
        DataError: if `datasets` is not installed, or cannot read it.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{reference.text}: {_not_here(reference)}read through the datasets library, which is not installed: "
            f"{extra('data')}"
        ) from None
    datasets.disable_progress_bars()
    try:
        texts = _text_files(datasets, reference) if kind is None and reference.is_local else ()
        if texts:  # as if they were named one by one: the library guesses types, and what an empty cell means
            for file in texts:
                yield from read_file_rows(file)
            return
        found = _open(datasets, reference, kind, bounded)
        yield from dataset_rows(found, reference.text)
    except DataError:
        raise
    except Exception as cause:  # it fails in as many ways as there are formats
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise DataError(
            f"{reference.text}: {_not_here(reference)}the datasets library cannot read it ({reason})"
        ) from cause


def _not_here(reference: Reference) -> str:
    return "" if reference.is_local else "no such file or folder here; as a hub name "


def dataset_rows(dataset: Any, name: str) -> Found:
    """Rows of a `Dataset`, an `IterableDataset` or any other iterable of dicts."""
    plain = _in_python(dataset)
    tidy, named = hasattr(dataset, "features") and not _is_transformed(dataset), _named_classes(dataset)
    for number, row in enumerate(plain, 1):
        yield f"{name}: row {number}", Cells(_with_names(_tidy(row), named)) if tidy else row


def _in_python(dataset: Any) -> Any:
    """The same rows without tensors; what a transform makes of them stays, and columns that were left out do."""
    if not hasattr(dataset, "with_format") or _is_transformed(dataset):
        return dataset
    form = getattr(dataset, "format", None)
    chosen = {"columns": form["columns"]} if isinstance(form, Mapping) and form.get("columns") else {}
    return dataset.with_format(None, **chosen)


def _is_transformed(dataset: Any) -> bool:
    """Whether rows are made by somebody's own function as they are read."""
    form = getattr(dataset, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def _named_classes(dataset: Any) -> dict[str, list[str]]:
    """Columns of numbers that stand for classes, and the names of these."""
    features = getattr(dataset, "features", None) or {}
    found = {key: feature.names for key, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    # A name of digits would be taken for the number of another choice.
    return {key: names for key, names in found.items() if key != "gold" or not all(map(str.isdigit, names))}


class ClassName(str):
    """The name of a class in a column of numbers, and the number that is stored."""

    number: int

    @classmethod
    def of(cls, name: str, number: int) -> "ClassName":
        """One name."""
        made = cls(name)
        made.number = number
        return made


def _with_names(row: Any, named: Mapping[str, list[str]]) -> Any:
    """A row with names in the place of such numbers; -1 says that there is none."""
    told = {key: row[key] for key in named if isinstance(row.get(key), int)}
    found = {key: ClassName.of(named[key][number], number) if number >= 0 else None for key, number in told.items()}
    return row | found if found else row


def choose_split(splits: Mapping[str, Any], name: str) -> Any:
    """The split that is called train, or the only one.

    Raises:
        DataError: if that does not tell.
    """
    if "train" in splits or len(splits) == 1:
        return splits["train"] if "train" in splits else next(iter(splits.values()))
    raise DataError(f"{name}: has the splits {', '.join(map(str, splits)) or '(none)'}; choose one: {name}@SPLIT")


def _open(datasets: Any, reference: Reference, kind: str | None, bounded: bool) -> Any:
    if kind is not None:
        return datasets.load_dataset(kind, data_files=reference.place, split="train", streaming=True)
    if reference.is_local and any((reference.path / name).is_file() for name in _SAVED):
        found = datasets.load_from_disk(reference.place)
        return _split_of(found, reference)
    place, config, split = reference.place, reference.config, reference.split
    sliced = split is not None and "[" in split  # which is not streamed
    if (reference.is_local or bounded) and not sliced:
        return _split_of(datasets.load_dataset(place, config, streaming=True), reference)
    if split is None:
        split = choose_split({name: name for name in datasets.get_dataset_split_names(place, config)}, reference.text)
    return datasets.load_dataset(place, config, split=split)


def _text_files(datasets: Any, reference: Reference) -> list[Path]:
    """The files of a split of a folder, as the library chooses them; none if some are no text, or are told how to be read."""
    if any((reference.path / name).is_file() for name in _SAVED):
        return []
    _check_all_read(datasets, reference)
    config = datasets.load_dataset_builder(reference.place, reference.config).config
    told = [getattr(config, name, None) for name in ("features", "column_names", "skiprows", "field")]
    if not config.data_files or any(told) or (reference.split is not None and "[" in reference.split):
        return []
    files = [Path(file) for file in _split_of(config.data_files, reference)]
    return files if all(file.suffix.lower() in TEXT_ENDINGS for file in files) else []


def _check_all_read(datasets: Any, reference: Reference) -> None:
    """Refuses a folder of which the library takes one kind of files, or those named after a split, and leaves the others."""
    if reference.config is not None or _says_what_is_read(reference.path / "README.md"):
        return
    taken = datasets.load_dataset_builder(reference.place).config.data_files or {}
    read = {Path(file).resolve() for files in taken.values() for file in files}
    known = (*TEXT_ENDINGS, *TABLE_ENDINGS)
    others = sorted(file for file in read if file.suffix.lower() not in known)
    if others and len(others) < len(read):  # rows.jsonl.bak, which the library takes beside rows.jsonl
        raise DataError(
            f"{reference.text}: {others[0].name} would be read, too: its name ends in none of {', '.join(known)}; take it away, or "
            "name the files one by one"
        )
    every = (file for file in reference.path.rglob("*") if file.suffix.lower() in known)
    left = sorted(file for file in every if file.resolve() not in read and not file.name.startswith((".", "_")))
    if read and left:
        raise DataError(
            f"{reference.text}: {left[0].relative_to(reference.path)} would not be read beside "
            f"{min(read).name}: another kind of file, or a name that tells no split; name the files one by one"
        )


def _says_what_is_read(card: Path) -> bool:
    """Whether a README.md is a card that chooses files, and no mere text."""
    with suppress(OSError, UnicodeDecodeError):
        text = card.read_text(encoding="utf-8")
        return text.startswith("---") and "configs:" in text.split("---", 2)[1]
    return False


def _split_of(found: Any, reference: Reference) -> Any:
    if not isinstance(found, Mapping):
        if reference.split is not None:
            raise DataError(f"{reference.text}: is one data set without splits; leave out @{reference.split}")
        return found
    if reference.split is None:
        return choose_split(found, reference.text)
    if reference.split not in found:
        raise DataError(f"{reference.text}: no split {reference.split!r}; it has {', '.join(map(str, found))}")
    return found[reference.split]


def _tidy(value: Any) -> Any:
    """Without what Arrow adds: every object of a column has all keys that any of them has, null where it had none."""
    if isinstance(value, Mapping):
        return {key: _tidy(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    return value
