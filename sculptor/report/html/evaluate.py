"""The page of `evaluate`: measures, watched texts, tasks of lm-eval, and answers side by side."""

from pathlib import Path

from sculptor.evaluation.answers import Answer
from sculptor.evaluation.rows import Evaluation
from sculptor.report.evaluate import measures_rows, tasks_rows, watched_rows
from sculptor.report.html.page import Markup, element, page, place_name, section, table, tiles


def evaluate_page(result: Evaluation, model: str) -> str:
    """What `sculptor evaluate --html` writes."""
    return page(
        "evaluate",
        place_name(model),
        tiles((row[0], row[1], None) for row in measures_rows(result)) if result.loss is not None else None,
        section("Watched texts", table(*watched_rows(result), "watched texts")) if result.watched else None,
        section("Tasks of lm-eval", table(*tasks_rows(result), "tasks")) if result.tasks else None,
        section("Answers", element("div", list(map(_answer, result.answers)), class_="answers"))
        if result.answers
        else None,
    )


def _answer(answer: Answer) -> Markup:
    mark = element(
        "span", "✓ exact" if answer.exact else "✗ not exact", class_="good-mark" if answer.exact else "bad-mark"
    )
    parts = (("asked", answer.prompt), ("expected", answer.expected), ("said", answer.said))
    columns = [
        element("div", element("dt", name), element("dd", text or element("i", "nothing"))) for name, text in parts
    ]
    return element(
        "article", element("h3", Path(answer.where).name, " ", mark), element("dl", columns), class_="answer"
    )
