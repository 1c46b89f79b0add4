"""The page of `evaluate`: measures, watched texts, tasks of lm-eval, and answers side by side."""

import itertools
from pathlib import Path

from sculptor.evaluation.answers import Answer
from sculptor.evaluation.rows import Evaluation
from sculptor.report.evaluate import beside, measures_table, tasks_rows, watched_rows
from sculptor.report.html.page import Markup, element, page, place_name, section, table, tiles


def evaluate_page(result: Evaluation, model: str, base: str | None = None) -> str:
    """What `sculptor evaluate --html` writes."""
    return page(
        "evaluate",
        place_name(model) if base is None else f"{place_name(model)}, beside {place_name(base)}",
        _figures(result) if result.loss is not None else None,
        section("Watched texts", table(*watched_rows(result), "watched texts")) if result.watched else None,
        section("Tasks of lm-eval", table(*tasks_rows(result), "tasks")) if result.tasks else None,
        section("Answers", element("div", list(itertools.starmap(_answer, beside(result))), class_="answers"))
        if result.answers
        else None,
    )


def _figures(result: Evaluation) -> Markup:
    _, rows = measures_table(result)
    return tiles((row[0], row[1], f"base: {row[2]}" if row[2:] else None) for row in rows)


def _answer(answer: Answer, base: Answer | None) -> Markup:
    parts = [("asked", answer.prompt), ("expected", answer.expected), ("said", answer.said)]
    parts += [] if base is None else [("base said", base.said)]
    columns = [
        element("div", element("dt", name), element("dd", text or element("i", "nothing"))) for name, text in parts
    ]
    marks = [_mark(answer, ""), *([] if base is None else [" ", _mark(base, "base ")])]
    return element(
        "article", element("h3", Path(answer.where).name, " ", *marks), element("dl", columns), class_="answer"
    )


def _mark(answer: Answer, whose: str) -> Markup:
    return element(
        "span",
        f"✓ {whose}exact" if answer.exact else f"✗ {whose}not exact",
        class_="good-mark" if answer.exact else "bad-mark",
    )
