"""What `card` says of tuned models beside their base, and the thresholds that a release is held to."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sculptor.errors import SettingsError
from sculptor.model.harm import Harm, NamedHarm
from sculptor.numerics.ratio import Z95, Ratio

Role = Literal["task", "ability", "watched"]
SHARES = ("accuracy", "acc_norm", "exact_match", "refused", "followed", "instructions")
LENGTH = "length"
_THRESHOLD = re.compile(r"\s*([^<>\s]+)\s*([<>])\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")
HARM, FIRST, LEAK, UNVERIFIED = "harm", "harm.first", "leak", "unverified"
HARMS = (HARM, FIRST)
RESERVED = (*HARMS, LEAK, UNVERIFIED)


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one measure, before and after.

    Attributes:
        name: of the measure, as `--fail-if` calls it.
        role: what it was given as.
        figure: accuracy, acc_norm, exact_match, refused, followed or instructions, all shares; loss, in nats a token; or
            length, characters of an answer.
        num_rows: rows, or sequences of a text.
        base, tuned: the figure; `base_error` and `tuned_error` its standard errors.
        change: tuned minus base, row by row; `change_error` its standard error, `low` and `high` the ends of its 95 %
            confidence interval.
    """

    name: str
    role: Role
    figure: str
    num_rows: int
    base: float
    base_error: float
    tuned: float
    tuned_error: float
    change: float
    change_error: float
    low: float
    high: float

    @property
    def scale(self) -> float:
        """What turns it into the unit of `--fail-if`: points for shares."""
        return 100.0 if self.figure in SHARES else 1.0


@dataclass(frozen=True, slots=True)
class Leak:
    """What `verify` says; see `Verification`.

    Attributes:
        passed: whether it verifies.
        leak: of all matrices together, ||what is forbidden of dW|| / ||dW||; `rounding` what rounding explains of it.
        max_leak: of the matrix with the largest.
    """

    passed: bool
    leak: float
    rounding: float
    max_leak: float


@dataclass(frozen=True, slots=True)
class TunedCard:
    """One tuned model.

    Attributes:
        name: of its directory.
        lines: every figure.
        harm: KL(base || tuned) on samples of the base; `harm_low` and `harm_high` are its 95 % confidence interval.
        leak: None without an archive.
        failed: thresholds that it does not satisfy, each with what was found.
        named: what became of texts that the archive protects by name.
    """

    name: str
    lines: tuple[Line, ...]
    harm: Harm | None
    harm_low: float | None
    harm_high: float | None
    leak: Leak | None
    failed: tuple[str, ...]
    named: tuple[NamedHarm, ...] = ()


@dataclass(frozen=True, slots=True)
class CardReport:
    """The result of `card`.

    Attributes:
        base: its name.
        tuned: the models compared with it.
        thresholds: as they were given; `strict` whether the interval's worse end has to satisfy them.
        passed: whether all do.
        harm_of: whose samples harm was measured on: the archive's, from the first base of the lineage, or drawn from the base.
        phrases: an answer that has one of these near its beginning counts as a refusal; empty if nothing was asked for.
        left_out: what was not measured, and why.
    """

    base: str
    tuned: tuple[TunedCard, ...]
    thresholds: tuple[str, ...]
    strict: bool
    passed: bool
    harm_of: Literal["archive", "base"] | None
    phrases: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Threshold:
    """`NAME<VALUE` or `NAME>VALUE`: what a release fails by.

    Attributes:
        text: as it was given.
        name: of a measure, NAME or NAME.FIGURE; harm, harm.first, leak; or `unverified`.
        above: whether more than the value fails, else less.
        value: in points, nats, or of the leak.
    """

    text: str
    name: str
    above: bool
    value: float


def parse_threshold(text: str) -> Threshold:
    """A threshold of the command line.

    Raises:
        SettingsError: if it is none.
    """
    if text.strip() == UNVERIFIED:
        return Threshold(text, UNVERIFIED, True, 0.0)
    found = _THRESHOLD.fullmatch(text)
    try:
        if found is not None and math.isfinite(value := float(found[3])):
            return Threshold(text.strip(), found[1], found[2] == ">", value)
    except ValueError:
        pass
    raise SettingsError(
        f"--fail-if {text!r}: expected NAME<VALUE or NAME>VALUE, like piqa<-1 or harm>0.02, or {UNVERIFIED}"
    )


def check_known(thresholds: Sequence[Threshold], figures: Mapping[str, Sequence[str]], others: Sequence[str]) -> None:
    """Refuses thresholds of what is not measured, before any work.

    Args:
        thresholds: parsed.
        figures: of every measure.
        others: which of harm, harm.first, leak and unverified there will be, and names that the archive protects.

    Raises:
        SettingsError: naming what there is.
    """
    known = {*others, *figures, *(f"{name}.{figure}" for name, found in figures.items() for figure in found)}
    for threshold in thresholds:
        if threshold.name not in known:
            needs = " (needs --subspaces)" if threshold.name in (LEAK, UNVERIFIED) else ""
            names = ", ".join([*others, *figures])
            raise SettingsError(
                f"--fail-if {threshold.text}: {threshold.name!r} is not measured{needs}; measured are {names}"
            )


def failures(
    thresholds: Sequence[Threshold],
    lines: Sequence[Line],
    harm: Harm | None,
    leak: Leak | None,
    named: Sequence[NamedHarm],
    *,
    strict: bool,
) -> tuple[str, ...]:
    """The thresholds that do not hold, with what was found; `strict` looks at the worse end of the 95 % interval."""
    failed = []
    for threshold in thresholds:
        found, unit = _found(threshold, lines, harm, leak, named)
        if threshold.name == UNVERIFIED:
            failed += ["unverified: verify says FAILED"] if found.mean else []
            continue
        exact = threshold.name == LEAK or not strict
        value = found.mean if exact else found.high if threshold.above else found.low
        if not (value <= threshold.value if threshold.above else value >= threshold.value):  # no number passes nothing
            end = "" if exact else ", the interval's end"
            failed.append(f"{threshold.text}: found {value:+.4g}{unit}{end}")
    return tuple(failed)


def _found(
    threshold: Threshold, lines: Sequence[Line], harm: Harm | None, leak: Leak | None, named: Sequence[NamedHarm]
) -> tuple[Ratio, str]:
    """What a threshold is about, in its unit."""
    if threshold.name in HARMS:
        assert harm is not None
        found = (harm.nats, harm.error) if threshold.name == HARM else (harm.first, harm.first_error)
        return Ratio(*found), " nats"
    if threshold.name in (LEAK, UNVERIFIED):
        assert leak is not None
        return Ratio(leak.leak if threshold.name == LEAK else float(not leak.passed), 0.0), ""
    for each in named:
        if each.name == threshold.name:
            return Ratio(each.rise, each.rise_error), " nats"
    met = [each for each in lines if threshold.name in (each.name, f"{each.name}.{each.figure}")]
    line = next((each for each in met if each.name == threshold.name), met[0])  # a whole name goes before a figure's
    unit = " points" if line.figure in SHARES else " characters" if line.figure == LENGTH else " nats"
    return Ratio(line.scale * line.change, line.scale * line.change_error), unit


def interval(harm: Harm) -> tuple[float, float]:
    """The 95 % confidence interval of harm."""
    return harm.nats - Z95 * harm.error, harm.nats + Z95 * harm.error
