"""The kinds of rules there are: what archive.json may name, and what makes them. An archive never names an import path.

`TABLE` says what goes together: of every kind of sculptor's own the bases, and with each of them the constraints and the
options of an analysis; how rules go on, its method says (`carries`). Everything else is refused by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pydantic_core
from pydantic import ValidationError

from sculptor.errors import SettingsError
from sculptor.methods.lowrank import LowRank, LowRankRule
from sculptor.methods.mask import Mask, MaskRule
from sculptor.methods.method import Checks, Method
from sculptor.methods.moments import Moments
from sculptor.methods.rotation import Rotation, RotationRule
from sculptor.methods.rule import Rule
from sculptor.methods.settings import AnalyzeSettings, Basis, Carry
from sculptor.methods.staircase import StaircaseRule
from sculptor.methods.weights import Weights
from sculptor.numerics.staircase import Constraint
from sculptor.validation import adapter, faults, option


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


class Row(NamedTuple):
    """What goes with a kind of rule and a basis.

    Attributes:
        method: makes such rules.
        constraints: that can be chosen; others have one, or one that follows from the basis.
        options: of an analysis, beside those that always are; a method may refuse some of them in some cases.
    """

    method: Callable[[AnalyzeSettings], Method]
    constraints: tuple[Constraint, ...]
    options: frozenset[str]

    @property
    def carries(self) -> tuple[Carry, ...]:
        """The ways in which rules go on, the default first."""
        found: tuple[Carry, ...] = getattr(self.method, "carries", ())
        return tuple(dict.fromkeys((*found, "keep")))


_ALWAYS = frozenset({"rule", "basis", "seed", "targets", "exclude", "device"})
_ROWS = frozenset({"data", "chat", "chat_template", "calibration_tokens", "max_length", "device_memory"})
_OWN = frozenset({"free", "rank", "energy", "block_size"})  # of other rules than staircases
_STAIRCASE = frozenset(field.name for field in fields(AnalyzeSettings)) - _ALWAYS - _OWN
_ALL: tuple[Constraint, ...] = ("double", "input", "core")

TABLE: Mapping[str, Mapping[Basis, Row]] = {
    "staircase": {
        "weights": Row(Weights, _ALL, _STAIRCASE),
        "inputs": Row(Moments, (), _STAIRCASE),
        "curvature": Row(Moments, (), _STAIRCASE),
        "random": Row(Weights, _ALL, _STAIRCASE),
    },
    "lowrank": {
        "inputs": Row(LowRank, (), _ROWS | {"rank", "energy", "dtype"}),
        "random": Row(LowRank, (), _ROWS | {"rank", "energy", "dtype"}),
    },
    "mask": {
        "weights": Row(Mask, (), frozenset({"free"})),
        "random": Row(Mask, (), frozenset({"free"})),
    },
    "rotation": {
        "weights": Row(Rotation, (), frozenset({"block_size", "preserve", "dtype"})),
        "random": Row(Rotation, (), frozenset({"block_size", "preserve", "dtype"})),
    },
}


def _method_of(settings: AnalyzeSettings) -> Method:
    """By the table.

    Raises:
        SettingsError: if the basis, or an option, does not go with the rule.
    """
    rows = TABLE[settings.rule]
    row = rows.get(settings.resolved_basis)
    if row is None:
        raise SettingsError(
            f"--basis {settings.basis} does not go with --rule {settings.rule}: use {' or '.join(rows)}"
        )
    idle = settings.given(*(name for name in _STAIRCASE | _OWN if name not in row.options))
    if idle:
        raise SettingsError(f"{', '.join(sorted(idle))} without effect with --rule {settings.rule}{_homes(idle)}")
    return row.method(settings)


def _homes(idle: Sequence[str]) -> str:
    """Which rules have a use for options that are some rule's own."""
    said = []
    for name in sorted(_OWN):
        rules = [rule for rule, rows in TABLE.items() if any(name in row.options for row in rows.values())]
        if option(name) in idle:
            said.append(f"{option(name)} goes with {' and '.join(rules)}")
    return f"; {', '.join(said)}" if said else ""


KINDS: Kinds = {
    "staircase": Kind(StaircaseRule, _method_of),
    "lowrank": Kind(LowRankRule, _method_of),
    "mask": Kind(MaskRule, _method_of),
    "rotation": Kind(RotationRule, _method_of),
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
        rule: Rule = adapter(cls).validate_json(pydantic_core.to_json(value))
    except ValidationError as error:
        raise ValueError(f"rule: {faults(error)}") from None
    return rule
