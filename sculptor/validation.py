"""What comes from outside, checked against the type of its field: JSON from disk, and settings. All faults in one line.

Facts are frozen dataclasses with `__pydantic_config__ = STRICT`: made by us they cost nothing, read from JSON (`read_json`)
types, ranges, finite numbers and names are checked, and nothing unknown passes. Settings (`settings`) are checked
whenever they are made, since people make them.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

import pydantic_core
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from sculptor.errors import SculptorError, SettingsError

T = TypeVar("T")

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
MAX_JSON_BYTES = 2**30
_MAX_LISTED = 4
_MAX_SHOWN = 60

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
Finite = Annotated[float, Field(ge=-1e30, le=1e30)]
Count = Annotated[int, Field(ge=0, le=2**53)]
AtLeastOne = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
# One line of text: no control characters or line separators.
Name = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")]
Text = Annotated[str, Field(max_length=100_000)]
FileName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FloatDtype = Literal["float64", "float32", "bfloat16", "float16"]
# Paths are taken where texts are, lists where tuples are, and one where there may be several: people have all of these.
Texts = Annotated[
    tuple[
        Annotated[
            str,
            BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
            Field(max_length=10_000),
        ],
        ...,
    ],
    Field(strict=False),
    BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value),
]

# `ours=theirs,ours=theirs`; a mapping is taken, too.
ColumnNames = Annotated[
    str,
    BeforeValidator(
        lambda value: (
            ",".join(f"{ours}={theirs}" for ours, theirs in value.items())
            if isinstance(value, Mapping) and all(isinstance(theirs, str) for theirs in value.values())
            else value
        )
    ),
    Field(min_length=1, max_length=10_000),
]


@dataclass(frozen=True, slots=True)
class Off:
    """Metadata of a switch: the option that turns it off."""

    name: str


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass whose values are checked when it is made; its fields' docstrings are the help of its options.

    A fault is a SettingsError that names the option.
    """
    config = ConfigDict(**STRICT, use_attribute_docstrings=True)
    made: Any = checked_dataclass(frozen=True, kw_only=True, slots=True, config=config)(cls)
    make = made.__init__

    def __init__(self: Any, **values: Any) -> None:
        try:
            make(self, **values)
        except ValidationError as error:
            raise SettingsError("; ".join(map(_option_fault, error.errors(include_url=False)))) from None

    made.__init__ = __init__
    result: type[T] = made
    return result


def option(name: str) -> str:
    """How the command line calls a field."""
    return "--" + name.replace("_", "-")


@functools.cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    """Of a checked type. Made once: that takes longer than reading a file with it, and a manifest has thousands of rules."""
    return TypeAdapter(cls)


def read_json(
    cls: type[T], text: bytes | str, where: object, error: type[SculptorError], remedy: str, **context: Any
) -> T:
    """JSON as a value of a checked type.

    Args:
        cls: a dataclass of facts.
        text: the JSON.
        where: names the file in messages.
        error: what is raised.
        remedy: what to do, the end of the message.
        context: for validators of fields.

    Raises:
        error: with all faults, in one line.
    """
    try:
        value: T = adapter(cast("Any", cls)).validate_json(text, context=context)
        return value
    except ValidationError as cause:
        raise error(f"{where}: damaged ({faults(cause)}); {remedy}") from None
    except RecursionError:
        raise error(f"{where}: damaged (nested too deeply); {remedy}") from None


def read_file(path: Path, error: type[SculptorError], remedy: str) -> bytes:
    """The bytes of a JSON file.

    Raises:
        error: if it cannot be read or is far too large.
    """
    try:
        found = path.stat()
        if not (S_ISREG(found.st_mode) or S_ISDIR(found.st_mode)):  # reading a pipe or a device might never end
            raise error(f"{path}: is no regular file; {remedy}")
        if found.st_size > MAX_JSON_BYTES:
            raise error(f"{path}: {found.st_size:,} bytes, expected at most {MAX_JSON_BYTES:,}; {remedy}")
        return path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause}); {remedy}") from cause


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, sha256: str, error: type[SculptorError], remedy: str) -> None:
    """Refuses a file that is not as it was written.

    Raises:
        error: if it has another digest, or cannot be read.
    """
    try:
        same = file_digest(path) == sha256
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); {remedy}") from cause
    if not same:
        raise error(f"{path}: has changed since it was written (its digest differs); {remedy}")


def parse(
    text: bytes, where: object, error: type[SculptorError], remedy: str, *, allow_inf_nan: bool = False
) -> dict[str, Any]:
    """JSON as a plain object: finite numbers only, unless allowed, not nested without end.

    Raises:
        error: if it is anything else.
    """
    try:
        content = pydantic_core.from_json(text, allow_inf_nan=allow_inf_nan)
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: damaged ({_short(str(cause))}); {remedy}") from None
    if not isinstance(content, dict):
        raise error(f"{where}: damaged (expected a JSON object, found {type(content).__name__}); {remedy}")
    return content


def each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; of a key that stands there twice, programs take one or the other.

    Raises:
        ValueError: naming it.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {_short(ascii(twice))} twice")
    return content


def sign(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order and spacing it is written in."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def faults(error: ValidationError) -> str:
    """What is wrong, in a line: the first few faults with their places."""
    found = error.errors(include_url=False)
    shown = [f"{'.'.join(map(_place, item['loc'])) or 'content'}: {_reason(item)}" for item in found[:_MAX_LISTED]]
    return "; ".join(shown) + (f"; and {len(found) - len(shown)} more" if len(found) > len(shown) else "")


def _place(part: int | str) -> str:
    text = str(part)
    return text if text.isidentifier() or text.isdigit() else ascii(_short(text))


def _option_fault(item: Mapping[str, Any]) -> str:
    if item["type"] == "value_error":  # of __post_init__: complete as it is
        return str(item["ctx"]["error"])
    place = item["loc"]
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown setting {place[0]!r}" if place else "unknown setting"
    return f"{option(str(place[0])) if place else 'settings'} {_value(item)}: {_reason(item)}"


def _value(item: Mapping[str, Any]) -> str:
    return _short(str(item["input"]))


def _reason(item: Mapping[str, Any]) -> str:
    """One fault in words: found against expected."""
    context = item.get("ctx", {})
    bounds = {
        "greater_than": "more than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "less than {lt}",
        "less_than_equal": "at most {le}",
        "finite_number": "a finite number",
        "float_type": "a number",
        "int_type": "a whole number",
        "string_type": "text",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "string_pattern_mismatch": "another form",
        "string_too_short": "some text",
    }
    if item["type"] in bounds:
        return f"expected {bounds[item['type']].format(**context)}, found {_short(repr(item['input']))}"
    if item["type"] == "literal_error":
        return f"expected {context['expected']}, found {_short(repr(item['input']))}"
    if item["type"] == "missing":
        return "is missing"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return "is unknown"
    if item["type"] == "value_error":
        return _short(str(context["error"]), 400)
    return _short(str(item["msg"]))


def _short(text: str, limit: int = _MAX_SHOWN) -> str:
    """One line of printable text."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"
