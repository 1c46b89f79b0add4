"""Wrong values for every field of a model, made from the model itself: what a reader of JSON has to refuse."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import JsonValue

HUGE = 10**400


class Mutation(NamedTuple):
    """One changed document: what was done to it, and whether it has to be refused."""

    what: str
    content: Any
    must_fail: bool


def mutations(model: Any, content: Any, swap: Mapping[Any, Any]) -> Iterator[Mutation]:
    """Every field of a document, wrong in every way; `swap` gives models for types that a validator reads."""
    for path, value, must_fail in _walk(model, content, (), swap):
        changed = copy.deepcopy(content)
        _set(changed, path, value)
        yield Mutation(f"{'.'.join(map(str, path))} = {_show(value)}", changed, must_fail)


class _Missing:
    """Takes the place of a key that goes."""


def _show(value: Any) -> str:
    return "(missing)" if value is _Missing else repr(value)[:40]


def _set(content: Any, path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        content = content[part]
    if value is _Missing:
        del content[path[-1]]
    else:
        content[path[-1]] = value


def _walk(
    hint: Any, value: Any, path: tuple[Any, ...], swap: Mapping[Any, Any]
) -> Iterator[tuple[tuple[Any, ...], Any, bool]]:
    bounds: list[Any] = []
    optional = False
    while get_origin(hint) in (Annotated, Union, UnionType):
        if get_origin(hint) is Annotated:
            hint, *metadata = get_args(hint)
            bounds += [part for item in metadata for part in getattr(item, "metadata", [item])]
            continue
        choices = [choice for choice in get_args(hint) if choice is not type(None)]
        optional |= len(choices) < len(get_args(hint))
        if len(choices) > 1:
            return  # several forms: left to tests of their own
        hint = choices[0]
    hint = swap.get(hint, hint)
    if hint in (JsonValue, Any):
        return
    if path:
        yield from ((path, wrong, must) for wrong, must in _wrong(hint, value, bounds, optional))
    if value is None:
        return
    if is_dataclass(hint):
        yield (*path, "surprise"), 1, True
        hints = get_type_hints(hint, include_extras=True)
        for field in fields(hint):
            if field.name in value:
                has_default = field.default is not MISSING or field.default_factory is not MISSING
                yield (*path, field.name), _Missing, not has_default
                yield from _walk(hints[field.name], value[field.name], (*path, field.name), swap)
    elif isinstance(value, dict):
        for key in list(value)[:1]:
            yield from _walk(get_args(hint)[1], value[key], (*path, key), swap)
    elif isinstance(value, list) and value:
        inner = get_args(hint)
        for i in range(1 if inner[1:] == (...,) else len(value)):
            yield from _walk(inner[0 if inner[1:] == (...,) else i], value[i], (*path, i), swap)


def _wrong(hint: Any, value: Any, bounds: list[Any], optional: bool) -> Iterator[tuple[Any, bool]]:
    """Values of other types, and such as are out of range; whether each has to be refused."""
    if value is not None and not optional:
        yield None, True
    yield {"x": {"y": 1}}, not isinstance(value, dict) or is_dataclass(hint)
    yield [[["x"]]], True
    if hint in (int, float):
        yield "3", True
        yield True, True
        yield float("nan"), True
        yield float("inf"), True
        yield -HUGE, True
        yield HUGE, True
        yield (
            -1,
            any(getattr(bound, name, None) is not None for bound in bounds for name in ("ge", "gt"))
            and not any((getattr(bound, "ge", None) or 0) < 0 for bound in bounds),
        )
        if hint is int:
            yield 2.5, True
    elif hint is bool:
        yield "true", True
        yield 1, True
    elif hint is str or get_origin(hint) is Literal:
        yield 3, True
        yield float("nan"), True
        yield (
            "a\nb\x1b[31m",
            (bool(bounds) and any(getattr(bound, "pattern", None) for bound in bounds)) or hint is not str,
        )
        yield "x" * 10**6, True
        if get_origin(hint) is Literal:
            yield "os.system", True
    else:
        yield 3, True
        yield "text", not isinstance(value, list)
        yield float("nan"), True
