"""A continual run as text."""

from pathlib import Path

from sculptor.benchmark.results import ContinualReport
from sculptor.report.text import table

_MAX_NAME = 16  # characters of a column's head


def continual_text(report: ContinualReport) -> str:
    """What `sculptor continual` prints."""
    percent_scores = report.metric != "loss"

    def cell(value: float) -> str:
        return f"{100 * value:.1f}" if percent_scores else f"{-value:.3f}"

    watched = list(report.stages[0].watched)
    rows = [
        [stage.name, *map(cell, scores), *(f"{stage.watched[name]:.3f}" for name in watched)]
        for stage, scores in zip(report.stages, report.matrix, strict=True)
    ]
    head = ["after", *report.tasks, *(Path(name).stem[:_MAX_NAME] for name in watched)]
    m = report.metrics
    scale = 100 if percent_scores else 1
    figures = [("AA", m.average), ("BWT", m.backward), ("LA", m.learning), ("FWT", m.forward)]
    shown = [
        f"{name} {scale * value:+.2f}" if name in ("BWT", "FWT") else f"{name} {scale * value:.2f}"
        for name, value in figures
        if value is not None
    ]
    if report.watch_rise is not None:
        first, last = report.stages[0].watched, report.stages[-1].watched
        each = [f"{Path(name).stem[:_MAX_NAME]} {last[name] - first[name]:+.3f}" for name in watched]
        shown.append(f"watched loss {report.watch_rise:+.3f}" + (f" ({', '.join(each)})" if len(each) > 1 else ""))
    how = report.method + (f" ({report.basis})" if report.method == "sculptor" else "")
    unit = f"{report.metric.replace('_', ' ')} on {report.split} rows" + (
        ", %" if percent_scores else ", nats per token"
    )
    seconds = sum(stage.seconds for stage in report.stages)
    return "\n".join(
        [
            table(head, rows),
            f"{unit}; method {how}, seed {report.seed}, {seconds:.0f} s of training",
            ", ".join(shown),
            f"\nWrote {report.output} (continual.json, model/).",
        ]
    )
