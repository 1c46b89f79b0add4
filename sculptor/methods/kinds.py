"""The kinds of rules there are: what archive.json may name, and what makes them. An archive never names an import path."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from sculptor.errors import SettingsError
from sculptor.methods.method import Checks, Method
from sculptor.methods.moments import Moments
from sculptor.methods.rule import Rule
from sculptor.methods.settings import AnalyzeSettings, Basis
from sculptor.methods.staircase import StaircaseRule
from sculptor.methods.weights import Weights
from sculptor.validation import faults


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of rule.

    Attributes:
        rule: the dataclass that a record's `rule` is read as.
        method: makes what derives and carries such rules, for the settings of an analysis.
    """

    rule: type[Rule]
    method: Callable[[AnalyzeSettings], Method]


Kinds = Mapping[str, Kind]

_STAIRCASES: Mapping[Basis, Callable[[AnalyzeSettings], Method]] = {
    "weights": Weights,
    "random": Weights,
    "inputs": Moments,
    "curvature": Moments,
}
KINDS: Kinds = {
    "staircase": Kind(StaircaseRule, lambda settings: _STAIRCASES[settings.basis](settings)),
}


def known_kinds(more: Kinds | None) -> Kinds:
    """The kinds of this program and a caller's own.

    Raises:
        SettingsError: if one of these has a name that is taken.
    """
    taken = sorted(set(more or {}) & set(KINDS))
    if taken:
        raise SettingsError(f"rules: {taken[0]!r} is a kind of sculptor's own; use another name")
    return {**KINDS, **(more or {})}


def make_method(settings: AnalyzeSettings, kinds: Kinds = KINDS, shapes: Any = ()) -> Method:
    """What derives and carries the rules of an analysis, checked against its settings.

    Args:
        settings: of the analysis.
        kinds: there are.
        shapes: (m, n) of the matrices, where they are known.

    Raises:
        SettingsError: naming everything that is unknown, contradictory, or without effect.
    """
    if settings.rule not in kinds:
        raise SettingsError(f"rule {settings.rule!r}: expected {', '.join(sorted(kinds))}")
    method = kinds[settings.rule].method(settings)
    wrong = method.check(shapes) if isinstance(method, Checks) else []
    if wrong:
        raise SettingsError("; ".join(wrong))
    return method


def parse_rule(value: Any, kinds: Kinds) -> Rule:
    """A record's `rule`.

    Raises:
        ValueError: if its kind is unknown, or something in it is wrong.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"rule of kind {kind!r}: expected one of {', '.join(sorted(kinds))}")
    cls: Any = kinds[kind].rule
    unknown = sorted(set(value) - {field.name for field in fields(cls)})
    if unknown:
        raise ValueError(f"rule: {unknown[0]!r} is unknown")
    try:
        rule: Rule = _adapter(cls).validate_json(pydantic_core.to_json(value))
    except ValidationError as error:
        raise ValueError(f"rule: {faults(error)}") from None
    return rule


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(cls: Any) -> TypeAdapter[Any]:
    """Made once for each class: a manifest has thousands of rules."""
    if cls not in _adapters:
        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]
