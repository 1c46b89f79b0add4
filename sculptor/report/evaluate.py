"""What a checkpoint can do, as text."""

import itertools
import textwrap
from collections.abc import Sequence

from sculptor.evaluation.answers import Answer
from sculptor.evaluation.rows import Evaluation
from sculptor.report.text import WIDTH, percent, table

_SHOWN = 400  # characters of a prompt or an answer
_WORTH_SHARING = 40  # characters


def evaluate_text(result: Evaluation) -> str:
    """What `sculptor evaluate` prints."""
    parts = []
    if result.loss is not None:
        parts.append(table(*measures_table(result)))
    if result.watched:
        parts.append(table(*watched_rows(result)))
    if result.tasks:
        parts.append(table(*tasks_rows(result)))
    start = shared_start([answer.prompt for answer in result.answers])
    if start:
        parts.append("\n".join(_wrapped("all", start)))
    parts += [_answer(answer, base, len(start)) for answer, base in beside(result)]
    return "\n\n".join(parts)


def shared_start(prompts: Sequence[str]) -> str:
    """What several prompts begin with, in whole lines: a system prompt that is worth showing once."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    start = "".join(column[0] for column in same) if len(prompts) > 1 else ""
    start = start[: start.rfind("\n") + 1]
    return start if len(start) >= _WORTH_SHARING else ""


def beside(result: Evaluation) -> list[tuple[Answer, Answer | None]]:
    """Answers, each with what the base says to the same row."""
    others = (None,) * len(result.answers) if result.base is None else result.base.answers
    return list(zip(result.answers, others, strict=True))


def measures_table(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what was measured on the rows, the base's figures in a column of their own."""
    rows = measures_rows(result)
    if result.base is None:
        return ["measure", "value"], rows
    named = {row[0]: row[1] for row in rows}
    other = {row[0]: row[1] for row in measures_rows(result.base)}
    names = [*named, *(name for name in other if name not in named)]
    return ["measure", "model", "base"], [[name, named.get(name, "-"), other.get(name, "-")] for name in names]


def watched_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of watched texts."""
    rows = [
        [text.name, f"{text.loss:.4f}", f"{text.perplexity:,.2f}", f"{text.num_tokens:,}"] for text in result.watched
    ]
    head = ["watched", "loss", "perplexity", "tokens"]
    if result.base is None:
        return head, rows
    return [*head, "base's loss"], [
        [*row, f"{text.loss:.4f}"] for row, text in zip(rows, result.base.watched, strict=True)
    ]


def tasks_rows(result: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of lm-eval's tasks."""
    rows = [
        [
            task.name,
            task.metric,
            f"{task.value:.4f}",
            "-" if task.error is None else f"{task.error:.4f}",
            "-" if task.num_rows is None else f"{task.num_rows:,}",
        ]
        for task in result.tasks
    ]
    head = ["task of lm-eval", "metric", "value", "error", "rows"]
    if result.base is None:
        return head, rows
    known = {(task.name, task.metric): f"{task.value:.4f}" for task in result.base.tasks}
    return [*head, "base"], [
        [*row, known.get((task.name, task.metric), "-")] for row, task in zip(rows, result.tasks, strict=True)
    ]


def measures_rows(result: Evaluation) -> list[list[str]]:
    """What was measured on the rows: names and values."""
    rows = [["loss", f"{result.loss:.4f}"], ["perplexity", f"{result.perplexity:,.2f}"]]
    if result.classified:
        assert result.accuracy is not None
        rows = [["loss", f"{result.loss:.4f}"]]
        rows.append([f"accuracy ({len(result.labels or ())} classes)", percent(result.accuracy)])
    elif result.accuracy is not None:
        ranked = "each row's choices" if result.labels is None else f"{len(result.labels)} labels"
        rows.append([f"accuracy (ranking {ranked})", percent(result.accuracy)])
    if result.acc_norm is not None:
        rows.append(["accuracy (the same, per character)", percent(result.acc_norm)])
    if result.exact_match is not None:
        rows.append(["exact match", percent(result.exact_match)])
    rows.append(["rows", f"{result.num_rows:,}"])
    if not result.classified:
        rows.append(["tokens", f"{result.num_tokens:,}"])
    rows += [[f"rows to {task}", f"{count:,}"] for task, count in result.routed.items()]
    if result.num_dropped:
        rows.append(["rows or turns dropped, too long", f"{result.num_dropped:,}"])
    if result.num_cut:
        rows.append([f"rows with a {'text' if result.classified else 'prompt'} cut", f"{result.num_cut:,}"])
    return rows


def _answer(answer: Answer, base: Answer | None, shared: int) -> str:
    lines = [answer.where]
    asked = ("… " if shared else "") + answer.prompt[shared:]
    parts = [("asked", asked), ("expected", answer.expected), ("said", answer.said)]
    for name, text in [*parts, *([] if base is None else [("base", base.said)])]:
        lines += _wrapped(name, text)
    return "\n".join([*lines, f"  {_mark(answer)}" + ("" if base is None else f"; the base: {_mark(base)}")])


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        _printable(text), WIDTH, initial_indent=f"  {name:9}", subsequent_indent=" " * 11, break_on_hyphens=False
    ) or [f"  {name:9}(nothing)"]


def _mark(answer: Answer) -> str:
    return "exact" if answer.exact else "not exact"


def _printable(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
