"""The page of `continual`: the matrix of tasks, its figures, and the loss on watched texts."""

from sculptor.benchmark.results import ContinualReport, Stage
from sculptor.report.continual import method_of, metrics_text, score_text, stage_harm, unit_of
from sculptor.report.html.curves import Curve, chart
from sculptor.report.html.heat import Cell, Head, heat_map
from sculptor.report.html.page import Child, Markup, element, page, section, table, tiles
from sculptor.report.text import first_text, shown_name, size

_MEANINGS = {
    "AA": "average in the end",
    "BWT": "forgetting, if negative",
    "LA": "right after learning",
    "FWT": "what earlier tasks gave",
}


def continual_page(report: ContinualReport) -> str:
    """What `sculptor continual --html` writes."""
    seconds = sum(stage.seconds for stage in report.stages)
    return page(
        "continual",
        f"{report.output.name}: {len(report.tasks)} task{'s' if len(report.tasks) != 1 else ''} by {method_of(report)}",
        element("p", f"Seed {report.seed}, {report.split} rows, {seconds:.0f} s of training.", class_="soft"),
        tiles(_tiles(report)),
        section("Every task after every stage", _matrix(report)),
        section("Loss on watched texts", _watched(report)) if report.stages[0].watched else None,
        section("Stages", _stages(report)),
    )


def _tiles(report: ContinualReport) -> list[tuple[str, str, str | None]]:
    found: list[tuple[str, str, str | None]] = [(name, value, _MEANINGS[name]) for name, value in metrics_text(report)]
    if report.watch_rise is not None:
        found.append(("Watched loss", f"{report.watch_rise:+.3f}", "from the base to the end"))
    if report.harm is not None:
        error = f"± {report.harm.error:.4f} nats a token, KL(base || new); {first_text(report.harm)} at the first of an answer"
        found.append(("Harm", f"{report.harm.nats:.4f}", error))
    return found


def _matrix(report: ContinualReport) -> Markup:
    values = [value for row in report.matrix for value in row]
    low, high = (min(values), max(values)) if report.metric == "loss" else (0.0, 1.0)
    heads = [Head.of(name) for name in report.tasks]
    rows = []
    for stage, scores in zip(report.stages, report.matrix, strict=True):
        cells = [
            _score(report, stage, task, value, low, high) for task, value in zip(report.tasks, scores, strict=True)
        ]
        rows.append((Head.of(stage.name), cells))
    return heat_map(
        unit_of(report),
        "A row per stage, a column per task; framed: the task that was just learned.",
        heads,
        rows,
        (score_text(report, low), score_text(report, high)),
        "after",
    )


def _score(report: ContinualReport, stage: Stage, task: str, value: float, low: float, high: float) -> Cell:
    level = (value - low) / (high - low) if high > low else 0.5
    return Cell(
        score_text(report, value),
        level,
        f"{task} after {stage.name}: {score_text(report, value)}",
        own=stage.name == task,
    )


def _watched(report: ContinualReport) -> Child:
    pictures = []
    for name in report.stages[0].watched:
        points = [(float(i), stage.watched[name]) for i, stage in enumerate(report.stages)]
        told = f"{points[0][1]:.3f} → {points[-1][1]:.3f} nats per token, {points[-1][1] - points[0][1]:+.3f}"
        curves = [Curve("loss", points)]
        pictures.append(chart(shown_name(name), told, curves, "stage (0: base)", lambda value: f"{value:.3f}"))
    return element("div", pictures, class_="grid small")


def _stages(report: ContinualReport) -> Markup:
    watched = list(report.stages[0].watched)
    counted = any(stage.peak_bytes is not None for stage in report.stages)
    rows = [
        [
            stage.name,
            *(f"{stage.watched[name]:.3f}" for name in watched),
            stage_harm(stage),
            f"{stage.seconds:.0f}",
            "–" if stage.archive_bytes is None else size(stage.archive_bytes),
            *([] if not counted else ["–" if stage.peak_bytes is None else size(stage.peak_bytes)]),
        ]
        for stage in report.stages
    ]
    head = ["after", *(f"loss on {shown_name(name)}" for name in watched), "harm", "seconds of training", "archive"]
    head += ["GPU memory"] if counted else []
    return table(head, rows, "stages")
