"""The page of `card`: whether a release may go out, and a table of what changed for each tuned model."""

from sculptor.jobs.card_report import CardReport, TunedCard
from sculptor.report.card import LINES_HEAD, harm_line, leak_line, line_row, notes_of
from sculptor.report.html.page import Child, Markup, element, listed, note, page, section, table
from sculptor.report.text import named_line


def card_page(report: CardReport) -> str:
    """What `sculptor card --html` writes."""
    names = ", ".join(card.name for card in report.tuned)
    return page(
        "card",
        f"{names} against {report.base}",
        _verdict(report) if report.thresholds else None,
        [section(card.name, *_tuned(card)) for card in report.tuned],
        [note(text) for text in notes_of(report)],
        section("Left out", listed(report.left_out)) if report.left_out else None,
    )


def _verdict(report: CardReport) -> Markup:
    failed = [card.name for card in report.tuned if card.failed]
    judged = "the worse end of the interval" if report.strict else "the figure itself"
    return element(
        "div",
        element("strong", "PASSED" if report.passed else "FAILED"),
        element("p", f"Not satisfied by {', '.join(failed)}.") if failed else None,
        element("p", f"Held against {judged}, a release fails by: {'; '.join(report.thresholds)}"),
        class_="verdict good" if report.passed else "verdict bad",
        role="status",
    )


def _tuned(card: TunedCard) -> list[Child]:
    parts: list[Child] = []
    if card.failed:
        parts += [element("h3", "Fails"), listed(card.failed)]
    if card.lines:
        parts.append(table(LINES_HEAD, list(map(line_row, card.lines)), card.name))
    if card.harm is not None:
        parts.append(element("p", harm_line(card.harm)))
    parts += [element("p", named_line(each)) for each in card.named]
    if card.leak is not None:
        parts.append(element("p", leak_line(card.leak)))
    return parts
