"""Pictures: an archive's spectra and preserved share, a continual run's matrix. Needs matplotlib (extra `plot`)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sculptor.archive.store import Archive
from sculptor.benchmark.frontier import FIRST, HARM, Frontier
from sculptor.benchmark.results import ContinualReport
from sculptor.distribution import extra
from sculptor.errors import SettingsError
from sculptor.methods.rule import Directed
from sculptor.report.html.page import GENERATOR, check_place, replacing

_SAYS_WHO = {"png": "Software", "pdf": "Creator", "svg": "Creator", "ps": "Creator", "eps": "Creator"}


def require_matplotlib() -> None:
    """Fails early where the picture could not be drawn.

    Raises:
        SettingsError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SettingsError(f"--plot needs matplotlib: {extra('plot')}") from None


def check_picture(
    path: Path, overwrite: bool, inputs: Iterable[str | Path | None] = (), output: Path | None = None
) -> None:
    """Refuses a picture file that exists, lies in one of the inputs or the output or is of no known format, before any work.

    Raises:
        OutputError: if it exists, is not ours where it may be replaced, or lies there.
        SettingsError: if matplotlib does not know the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_place(path, "--plot", overwrite, inputs, output)
    if path.suffix.lstrip(".") not in FigureCanvasAgg(Figure()).get_supported_filetypes():
        raise SettingsError(f"--plot {path}: unknown picture format {path.suffix!r}; use .png, .pdf or .svg")


def plot_matrix(report: ContinualReport, path: Path) -> None:
    """Draws the score of every task after every stage as a heat map.

    Raises:
        OutputError: if the picture cannot be written.
    """
    from matplotlib.figure import Figure

    rows, columns = len(report.stages), len(report.tasks)
    figure = Figure(figsize=(2.2 + 1.1 * columns, 1.6 + 0.6 * rows), layout="constrained")
    axes = figure.subplots()
    percent = report.metric != "loss"
    grid = [[100 * value if percent else -value for value in row] for row in report.matrix]
    image = axes.imshow(grid, aspect="auto", cmap="viridis" if percent else "viridis_r", interpolation="nearest")
    axes.set(title=f"{report.metric.replace('_', ' ')} after each task, {report.method}", xlabel="evaluated on")
    axes.set_ylabel("after")
    axes.set_xticks(range(columns), labels=report.tasks)
    axes.set_yticks(range(rows), labels=[stage.name for stage in report.stages])
    low, high = min(map(min, grid)), max(map(max, grid))
    for y, values in enumerate(grid):
        for x, value in enumerate(values):
            dark = (value - low) < 0.6 * (high - low)
            color = "white" if dark == percent else "black"
            axes.text(x, y, f"{value:.1f}" if percent else f"{value:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def plot_frontier(found: Frontier, path: Path) -> None:
    """Draws what was learned against what it cost.

    Raises:
        OutputError: if the picture cannot be written.
        SettingsError: if nothing was measured that it could cost.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if found.against is None:
        raise SettingsError("--plot: the runs measured neither harm nor watched texts")
    label = "KL(base || last)" if found.against in (HARM, FIRST) else "rise of the loss"
    drawn = [(point, value) for point in found.points if (value := point.cost(found.against)) is not None]
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    scale = 1 if found.metric == "loss" else 100
    colors = colormaps["tab20"].resampled(20)
    methods = list(dict.fromkeys(point.method for point, _ in drawn))
    # A line through the settings of a method; tasks in another order are another sequence.
    for method, tasks in dict.fromkeys((point.method, point.tasks) for point, _ in drawn):
        own = sorted(
            ((x, point.average) for point, x in drawn if (point.method, point.tasks) == (method, tasks)),
            key=lambda each: each[0].mean,
        )
        i, known = methods.index(method), axes.get_legend_handles_labels()[1]
        axes.errorbar(
            [x.mean for x, _ in own], [scale * y.mean for _, y in own],
            xerr=[x.deviation or 0 for x, _ in own], yerr=[scale * (y.deviation or 0) for _, y in own],
            marker="os^Dv<>Phd*X"[i % 12], color=colors(i % 20), markersize=6, linewidth=1.2,
            label=None if method in known else method,
        )  # fmt: skip
    if min(value.mean for _, value in drawn) > 0:
        axes.set_xscale("log")
    axes.set(
        xlabel=f"{found.against}: {label}, nats{'' if found.against == FIRST else ' a token'}",
        ylabel=f"AA, {'nats per token' if found.metric == 'loss' else '%'}",
    )
    axes.set_title(f"{', '.join(found.tasks)}: up is better, left is safer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_archive(archive: Archive, path: Path) -> None:
    """Draws the spectra of every role and a heat map of preserved share.

    Args:
        archive: read lazily, one spectrum at a time.
        path: a picture file; its suffix chooses the format.

    Raises:
        SettingsError: if matplotlib is missing or does not know the format.
        OutputError: if the picture cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    check_picture(path, overwrite=True)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    spectra, heat = figure.subplots(1, 2, width_ratios=[1.1, 1])
    _draw_spectra(spectra, archive)
    _draw_heat_map(figure, heat, archive)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Writes a picture that says who made it, if its format has room for that; whole or not at all."""
    ending = path.suffix.lstrip(".")
    told = {"metadata": {_SAYS_WHO[ending]: GENERATOR}} if ending in _SAYS_WHO else {}
    with replacing(path) as temporary:
        figure.savefig(temporary, format=ending, dpi=130, **told)


def middles(archive: Archive) -> dict[str, str]:
    """Role -> its matrix in the middle of the model, one that stands for the others."""
    roles: dict[str, list[str]] = {}
    for name, record in archive.items():
        roles.setdefault(record.role, []).append(name)
    return {role: names[len(names) // 2] for role, names in roles.items()}


def _draw_spectra(axes: Any, archive: Archive) -> None:
    """One curve per role, the middle layer's, with a dot at the last direction that is protected.

    Of a matrix with moments, eigenvalues of what it reads, as far as they are stored.
    """
    what = ""
    for role, name in middles(archive).items():
        entry = archive.read(name)
        found = entry.rule.spectrum_of(entry.tensors) if isinstance(entry.rule, Directed) else None
        if found is None or float(found.values[0]) == 0:
            continue
        what = found.what
        relative = (found.values / found.values[0]).tolist()
        k = min(len(relative), found.protected)
        positions = [(i + 1) / found.dim for i in range(len(relative))]
        (line,) = axes.plot(positions, relative, label=f"{role} (layer {entry.record.index})", linewidth=1.3)
        if k:
            axes.plot(positions[k - 1], relative[k - 1], "o", color=line.get_color(), markersize=5)
    axes.set(
        title=f"{what or 'No spectra'} of the middle layer, relative to the first (dot: last protected)",
        xlabel="direction / number of directions",
        ylabel="value / largest",
        yscale="log",
    )
    if what:
        axes.set_ylim(bottom=1e-4)
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_heat_map(figure: Any, axes: Any, archive: Archive) -> None:
    roles = list(dict.fromkeys(record.role for record in archive.values()))
    num_layers = 1 + max(record.index for record in archive.values())
    grid = [[float("nan")] * num_layers for _ in roles]
    for record in archive.values():
        grid[roles.index(record.role)][record.index] = record.rule.figures().preserved
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(title="Preserved share", xlabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks(range(len(roles)), labels=roles, fontsize=8)
    if num_layers * len(roles) <= 160:
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:
                    color = "black" if value > 0.6 else "white"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes)
