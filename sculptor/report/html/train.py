"""The page of `train`: what was taught to what, the curves of the run, and what it did to every matrix."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sculptor.archive.store import Archive
from sculptor.checkpoint.records import RECORD_NAME
from sculptor.jobs.train_report import TrainReport
from sculptor.report.html.curves import Curve, chart
from sculptor.report.html.figures import harm_tile, leak_map, leak_spot, share_map, update_map
from sculptor.report.html.heat import Spot
from sculptor.report.html.page import Child, details, element, listed, note, page, section, table, tiles
from sculptor.report.text import not_targeted_lines, percent
from sculptor.report.train import train_text

_COUNTERS = ("step", "epoch", "tokens", "seconds")
_TITLES = {
    "loss": ("Loss", "nats per token, of each step's rows"),
    "learning_rate": ("Learning rate", "of each step"),
    "relative_rate": ("Relative rate", "of each step, in the size of a matrix"),
    "harm": ("Harm", "nats a token, KL(base || new) on the archive's samples"),
    "harm_scale": ("Share of the update that the limit left", "1 where a measurement was below it"),
    "kl": ("Divergence", "nats a token, KL to the base on the rows' own tokens"),
    "grad_norm": ("Gradient norm", "of what is trained, before clipping"),
}


def train_page(report: TrainReport) -> str:
    """What `sculptor train --html` writes; reads record, metrics and archive of the output."""
    record = json.loads((report.output / RECORD_NAME).read_text(encoding="utf-8"))
    lines = (report.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = Archive(report.output / "subspaces")
    changed = any(matrix.update for matrix in report.matrices.values())
    matrices = report.matrices.items()
    return page(
        "train",
        f"{record['base']['name']} → {report.output.name}",
        element("p", f"Taught {', '.join(record['data']['files'])}.", class_="soft"),
        tiles(_tiles(report, changed)),
        note(
            "The leak was measured on the tensors that were written. ",
            element("code", "sculptor verify"),
            " judges it again from the files, and everything else that a user loads.",
        ),
        section("The run", _curves(list(map(json.loads, lines)))),
        section(
            "What it did to every matrix",
            element(
                "div",
                update_map([Spot(name, m.role, m.update, f"update {m.update:.1e}") for name, m in matrices]),
                leak_map([leak_spot(name, m.role, m.update, m.leak, m.rounding) for name, m in matrices]),
                share_map(
                    "Protected from now on",
                    f"{kept.method.terms.share.capitalize()} in the archive for the next task.",
                    [(name, kept[name].role, kept[name].rule.figures().preserved) for name in kept],
                ),
                class_="grid",
            ),
            details("Every matrix", _matrices(report)),
        ),
        section("In words", _words(report)),
        section("Settings", details("All settings", _settings(record["settings"]))),
    )


def _tiles(report: TrainReport, changed: bool) -> list[tuple[str, str, str | None]]:
    loop = report.loop
    found: list[tuple[str, str, str | None]] = [
        ("Loss", f"{loop.first_loss:.3f} → {loop.last_loss:.3f}", "first step; mean of the last tenth"),
        ("Steps", f"{loop.steps:,}", f"{loop.tokens or 0:,} tokens in {loop.seconds:.0f} s"),
        ("Rows", f"{report.num_examples:,}", f"{report.num_dropped:,} dropped, {report.num_cut:,} cut"),
        ("Free parameters", f"{report.num_trainable:,}", f"{report.num_protected:,} protected"),
    ]
    if loop.best_step is not None and loop.best_loss is not None:
        found.append(("Kept", f"step {loop.best_step:,}", f"evaluation loss {loop.best_loss:.4f}"))
    if changed:
        found += [
            (
                "Leak",
                f"{report.unexplained_leak:.1e}" if report.unexplained_leak > 0 else "none",
                "of the update, beyond what rounding explains",
            ),
            ("Largest leak", f"{report.max_leak:.1e}", "of a matrix's update, rounding and all"),
            ("Removed by rounding", percent(report.rounding_loss), "of the update"),
        ]
    else:
        found.append(("Update", "none", "no matrix changed"))
    return found + harm_tile(loop.harm, loop.named)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> Child:
    """A picture of every number that the steps logged; the evaluation's beside the loss."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name not in _COUNTERS and isinstance(value, int | float):
                series.setdefault(name, []).append((line["step"], value))
    if not series:
        return element("p", "No step was logged.")
    evaluated = series.pop("eval_loss", [])
    pictures: list[Child] = []
    for name, points in series.items():
        title, unit = _TITLES.get(name, (name.replace("_", " ").capitalize(), "as it was logged"))
        curves = [Curve(title.lower(), points)]
        if name == "loss" and evaluated:
            curves.append(Curve("evaluation", evaluated, dots=True))
        pictures.append(chart(title, unit, curves, "step", lambda value: f"{value:.4g}"))
    return element("div", pictures, class_="grid")


def _matrices(report: TrainReport) -> Child:
    rows = [
        [
            name,
            f"{m.update:.1e}",
            f"{m.leak:.2e}",
            f"{m.rounding:.2e}",
            percent(m.rounding_loss),
            f"{m.num_free_next:,}" + (" (frozen)" if m.frozen else ""),
        ]
        for name, m in report.matrices.items()
    ]
    return table(["matrix", "update", "leak", "rounding explains", "removed", "free next"], rows, "every matrix")


def _words(report: TrainReport) -> Child:
    """What the command prints, without the places of files."""
    said = train_text(report).splitlines()
    frozen = not_targeted_lines(report.not_targeted)
    sentences = [line for line in said if line.strip() and str(report.output) not in line and line not in frozen]
    more = details("What stays frozen", listed(frozen)) if frozen else None
    return [listed(sentences), more]


def _settings(settings: Mapping[str, Any]) -> Child:
    rows = [[f"--{name.replace('_', '-')}", _value(value)] for name, value in settings.items()]
    return table(["setting", "value"], rows, "settings", prose=True)


def _value(value: Any) -> str:
    if value is None or value == [] or value == ():
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
