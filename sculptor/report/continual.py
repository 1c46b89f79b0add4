"""A continual run as text."""

from sculptor.benchmark.results import ContinualReport, Stage
from sculptor.model.harm import Harm
from sculptor.report.text import first_text, harm_text, short_name, table

_MAX_NAME = 16  # characters of a column's head


def continual_text(report: ContinualReport) -> str:
    """What `sculptor continual` prints."""
    watched = list(report.stages[0].watched)
    rows = [
        [
            stage.name,
            *(score_text(report, value) for value in scores),
            *(f"{stage.watched[name]:.3f}" for name in watched),
            *([] if report.harm is None else [stage_harm(stage)]),
        ]
        for stage, scores in zip(report.stages, report.matrix, strict=True)
    ]
    head = ["after", *report.tasks, *(short_name(name, _MAX_NAME) for name in watched)]
    head += [] if report.harm is None else ["harm"]
    shown = [f"{name} {value}" for name, value in metrics_text(report)]
    if report.watch_rise is not None:
        first, last = report.stages[0].watched, report.stages[-1].watched
        each = [f"{short_name(name, _MAX_NAME)} {last[name] - first[name]:+.3f}" for name in watched]
        shown.append(f"watched loss {report.watch_rise:+.3f}" + (f" ({', '.join(each)})" if len(each) > 1 else ""))
    seconds = sum(stage.seconds for stage in report.stages)
    return "\n".join(
        [
            table(head, rows),
            f"{unit_of(report)}; method {method_of(report)}, seed {report.seed}, {seconds:.0f} s of training",
            ", ".join(shown),
            *([] if report.harm is None else [harm_line(report.harm)]),
            f"\nWrote {report.output} (continual.json, model/).",
        ]
    )


def stage_harm(stage: Stage) -> str:
    """The harm of a stage, in the unit of `harm_line`."""
    return "-" if stage.harm is None else f"{round(stage.harm.nats, 4) + 0.0:.4f}"  # the base's is 0, not -0


def harm_line(harm: Harm) -> str:
    """What the last stage's harm is, and of what."""
    return f"harm {harm_text(harm)}; {first_text(harm)} at their first"


def score_text(report: ContinualReport, value: float) -> str:
    """A score of the matrix, in the unit of `unit_of`."""
    return f"{-value:.3f}" if report.metric == "loss" else f"{100 * value:.1f}"


def unit_of(report: ContinualReport) -> str:
    """What the matrix is made of."""
    unit = "nats per token" if report.metric == "loss" else "%"
    return f"{report.metric.replace('_', ' ')} on {report.split} rows, {unit}"


def method_of(report: ContinualReport) -> str:
    """How the tasks were learned."""
    return report.method + (f" ({report.basis})" if report.method == "sculptor" else "")


def metrics_text(report: ContinualReport) -> list[tuple[str, str]]:
    """The figures that a sequence defines, by name."""
    m, scale = report.metrics, 1 if report.metric == "loss" else 100
    figures = [("AA", m.average), ("BWT", m.backward), ("LA", m.learning), ("FWT", m.forward)]
    return [
        (name, f"{scale * value:+.2f}" if name in ("BWT", "FWT") else f"{scale * value:.2f}")
        for name, value in figures
        if value is not None
    ]
