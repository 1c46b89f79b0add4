"""Rows out of text files: JSONL, JSON arrays, CSV and TSV, plain text; read as they are asked for."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sculptor.data.columns import Cells
from sculptor.errors import DataError
from sculptor.validation import each_key_once

Found = Iterator[tuple[str, Any]]  # where, and what stands there
_PACKED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"
}  # fmt: skip
_LINE_END = re.compile(r"\r\n|\n|\r")  # JSON has none inside a line
_MAX_CELL = 2**31 - 1


def read_file_rows(path: Path) -> Found:
    """Every row of a text file, and where it stands.

    Raises:
        DataError: with file and line, for what cannot be read.
    """
    check_regular(path)
    text = _read_text(path)
    ending = path.suffix.lower()
    if ending == ".txt":
        if text.strip():
            yield f"{path}", {"text": text}
    elif ending in (".csv", ".tsv") and text.lstrip()[:1] != "{":
        yield from _read_table(path, text, "\t" if ending == ".tsv" else ",")
    elif _opens_array(text, ending):
        yield from _read_array(path, text)
    else:
        if text.lstrip()[:1] == "{" and text.lstrip()[1:2] in ("\n", "\r"):
            raise DataError(f"{path}: JSON over several lines; expected one object per line, or an array of them")
        for number, line in enumerate(_LINE_END.split(text), 1):
            if line.strip():
                yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def check_regular(path: Path) -> None:
    """Refuses a pipe or a device, which gives its content only once: data are read as often as they are needed.

    Raises:
        DataError: naming it.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise DataError(f"{path}: a pipe or a device, which can be read only once; write the rows into a regular file")


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, whatever it is called."""
    return _start(path) == b"PAR1"


def parse_json(text: str, where: str) -> Any:
    """One JSON value of a data file.

    Raises:
        DataError: if it is broken, has a key twice, or half a character.
    """
    try:
        return json.loads(text, object_pairs_hook=each_key_once)
    except json.JSONDecodeError as cause:
        raise DataError(f"{where}: broken JSON ({cause.msg} at column {cause.colno})") from cause
    except RecursionError:
        raise DataError(f"{where}: broken JSON (nested too deeply)") from None
    except ValueError as cause:  # a key twice, a number of thousands of digits
        raise DataError(f"{where}: broken JSON ({str(cause).split(';')[0]})") from cause


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except (OSError, ValueError):
        return b""


def _read_text(path: Path) -> str:
    """A file's text, with its own line ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except UnicodeDecodeError as cause:
        start = _start(path)
        packed = next((kind for magic, kind in _PACKED.items() if start.startswith(magic[:4])), None)
        if packed:
            raise DataError(f"{path}: packed by {packed}; unpack it first") from None
        raise DataError(f"{path}: not readable as UTF-8 text ({cause})") from cause
    except (OSError, ValueError) as cause:
        raise DataError(f"{path}: not readable ({cause})") from cause


def _opens_array(text: str, ending: str) -> bool:
    """Whether a file is an array, and not lines of which the first is one."""
    start = text[:10_000].lstrip()
    return start[:1] == "[" and (ending == ".json" or start[1:].lstrip()[:1] in ("{", "]"))


def _read_array(path: Path, text: str) -> Found:
    found = parse_json(text, f"{path}")
    if not isinstance(found, list):
        raise DataError(f"{path}: expected an array of objects")
    for number, row in enumerate(found, 1):
        yield f"{path}: row {number}", row


def _each_whole(text: str, first: int, last: int, count: int) -> bool:
    """Whether every one of some lines has as many tabs as a row has."""
    lines = _LINE_END.split(text)[first - 1 : last]
    return all(line.count("\t") == count - 1 for line in lines)


def _read_table(path: Path, text: str, delimiter: str) -> Found:
    """Cells are texts as they stand; an empty one is an empty text."""
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        head = next(reader, [])
        twice = next((name for name in head if head.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: two columns are called {twice!r}")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(head):
                    raise DataError(
                        f"{path}:{line}: {len(cells)} cells, the head has {len(head)}; quote cells with {delimiter!r}"
                    )
                if delimiter == "\t" and reader.line_num > line and _each_whole(text, line, reader.line_num, len(head)):
                    raise DataError(
                        f"{path}:{line}: quotes make one row of lines {line} to {reader.line_num}, each of which is a row by its "
                        "tabs; write the rows as .csv or JSON lines"
                    )
                if [cells[0].removeprefix("\ufeff"), *cells[1:]] == head:
                    raise DataError(f"{path}:{line}: the head again, as where files are put together; remove the line")
                yield f"{path}:{line}", Cells(zip(head, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as cause:
        raise DataError(f"{path}:{reader.line_num}: no table ({cause})") from cause
