"""A card as text: what tuned models can do, beside their base."""

import json
import math
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from sculptor.errors import SettingsError
from sculptor.jobs.card_report import LENGTH, SHARES, CardReport, Leak, Line, TunedCard
from sculptor.model.harm import Harm
from sculptor.report.html.page import check_place
from sculptor.report.text import WIDTH, first_text, harm_text, named_line, percent, table

LINES_HEAD = ["measured", "figure", "rows", "base", "tuned", "change", "95 % interval"]
_FIGURES = {
    "acc_norm": "accuracy/char",
    "exact_match": "exact match",
    "followed": "prompts followed",
    "instructions": "instr. followed",
    LENGTH: "answer's length",
}


def check_card_file(path: Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuses a place for a card's JSON: only an earlier card is ever replaced, since a model is full of other JSON.

    Raises:
        SculptorError: if it has another ending, is something else, or could not be written.
    """
    check_place(path, "--json", overwrite, inputs, is_ours=_is_card)
    if path.suffix.lower() != ".json":
        raise SettingsError(f"--json {path}: expected a name that ends in .json")


def _is_card(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {field.name for field in fields(CardReport)} <= found.keys()


def card_text(report: CardReport) -> str:
    """What `sculptor card` prints."""
    parts = [tuned_text(report, card) for card in report.tuned]
    parts += [_wrapped(note) for note in notes_of(report)]
    parts += [_wrapped(text) for text in report.left_out]
    if report.thresholds:
        parts.append(verdict_of(report))
    return "\n\n".join(parts)


def tuned_text(report: CardReport, card: TunedCard) -> str:
    """One tuned model."""
    lines = [f"{card.name} against {report.base}"]
    if card.lines:
        lines.append(table(LINES_HEAD, list(map(line_row, card.lines))))
    if card.harm is not None:
        lines.append(harm_line(card.harm))
    lines += list(map(named_line, card.named))
    if card.leak is not None:
        lines.append(leak_line(card.leak))
    return "\n".join([*lines, *(_wrapped(f"FAILS {text}") for text in card.failed)])


def line_row(line: Line) -> list[str]:
    """A figure before and after: shares in %, their change in points; a loss in nats a token, a length in characters."""
    share, scale = line.figure in SHARES, line.scale
    digits = 2 if share else 0 if line.figure == LENGTH else 4
    value = percent if share else f"{{:,.{digits}f}}".format
    moved = f"{{:+,.{digits}f}}"
    ends = [moved.format(scale * end) if math.isfinite(end) else "?" for end in (line.low, line.high)]
    figure = _FIGURES.get(line.figure, line.figure)
    changed = moved.format(scale * line.change)
    return [
        line.name,
        figure,
        f"{line.num_rows:,}",
        value(line.base),
        value(line.tuned),
        changed,
        f"{ends[0]} to {ends[1]}",
    ]


def harm_line(harm: Harm) -> str:
    """What harm is, and of how much."""
    return f"harm {harm_text(harm, 'tuned')}; {first_text(harm)} at their first"


def leak_line(leak: Leak) -> str:
    """What `verify` says."""
    word = "PASSED" if leak.passed else "FAILED"
    return f"leak {leak.leak:.2e}, rounding explains {leak.rounding:.2e}, largest of a matrix {leak.max_leak:.2e}: verify {word}"


def notes_of(report: CardReport) -> list[str]:
    """What has to be known to read it."""
    found = []
    if any(card.lines for card in report.tuned):
        found.append(
            "Changes are in points of a percentage, or nats a token of a loss; intervals are of differences row by row."
        )
    if any(line.figure == LENGTH for card in report.tuned for line in card.lines):
        found.append("An answer's length is in characters, up to where its tokens are cut.")
    if report.harm_of is not None:
        whose = "kept in the archive, of the first base" if report.harm_of == "archive" else f"drawn from {report.base}"
        found.append(f"Harm is measured on samples {whose}.")
    if report.phrases:
        listed = ", ".join(f'"{phrase}"' for phrase in report.phrases)
        found.append(f"Refused: an answer that has one of these in its first 200 characters: {listed}.")
    return found


def verdict_of(report: CardReport) -> str:
    """Whether every model satisfies every threshold."""
    judged = "the worse end of the interval" if report.strict else "the figure"
    told = f"{len(report.thresholds)} threshold{'s' if len(report.thresholds) != 1 else ''} on {judged}"
    failed = [f"{card.name} ({len(card.failed)} of {told})" for card in report.tuned if card.failed]
    return f"FAILED: {', '.join(failed)}" if failed else f"PASSED ({told})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
