"""Banks, as text."""

from collections.abc import Sequence

from sculptor.report.text import percent, table
from sculptor.tasks.bank import AddReport, Routed


def add_text(report: AddReport) -> str:
    """What `sculptor bank add` prints."""
    task = report.task
    rows = [
        ["tensors changed", f"{task.num_tensors:,}"],
        ["of them as two factors", f"{report.num_factored:,}"],
        ["kept of the change", percent(task.kept)],
        ["size", f"{task.num_bytes:,} bytes"],
        ["rows of its key", f"{task.rows:,}"],
        ["tasks now", ", ".join(report.tasks)],
    ]
    return table([f"task {task.name}", str(report.bank)], rows)


def route_text(report: Sequence[Routed]) -> str:
    """What `sculptor bank route` prints: a line for each of the data, a column for each task."""
    names = list(report[0].chosen)
    rows = [[one.name, f"{one.num_rows:,}", *(f"{one.chosen[name]:,}" for name in names)] for one in report]
    return table(["data", "rows", *names], rows)
