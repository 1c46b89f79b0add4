"""A continual run as text."""

from sculptor.benchmark.results import ContinualReport
from sculptor.report.text import table


def continual_text(report: ContinualReport) -> str:
    """What `sculptor continual` prints."""
    percent_scores = report.metric != "loss"

    def cell(value: float) -> str:
        return f"{100 * value:.1f}" if percent_scores else f"{-value:.3f}"

    has_general = report.stages[0].watch_loss is not None
    rows = [
        [stage.name, *map(cell, scores)] + ([f"{stage.watch_loss:.3f}"] if has_general else [])
        for stage, scores in zip(report.stages, report.matrix, strict=True)
    ]
    head = ["after", *report.tasks] + (["watched loss"] if has_general else [])
    m = report.metrics
    scale = 100 if percent_scores else 1
    figures = [("AA", m.average), ("BWT", m.backward), ("LA", m.learning), ("FWT", m.forward)]
    shown = [
        f"{name} {scale * value:+.2f}" if name in ("BWT", "FWT") else f"{name} {scale * value:.2f}"
        for name, value in figures
        if value is not None
    ]
    if report.watch_rise is not None:
        shown.append(f"watched loss {report.watch_rise:+.3f}")
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
