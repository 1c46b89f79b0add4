"""Curves over steps or directions, and staircases: SVG in the page, numbers beside it as text that a phone can read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sculptor.numerics.staircase import Staircase
from sculptor.report.html.page import Child, Markup, details, element, table

_SIDE = 1000  # of the drawing, in its own units
_MOST_POINTS = 400  # of a curve; more are drawn as means, with the range around them
_MOST_LISTED = 16  # values in the table below a curve
_GRID = 500  # of a staircase: finer than a picture of it
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in order of x; `dots` are single measurements, drawn as such."""

    name: str
    points: Sequence[Point]
    dots: bool = False


def chart(
    title: str, explained: str, curves: Sequence[Curve], x_name: str, show: Callable[[float], str], *, log: bool = False
) -> Markup:
    """Curves of one unit in one picture.

    Args:
        title: what is shown, and `explained` how.
        curves: one at least, each with a point at least.
        x_name: what x counts.
        show: a value as text.
        log: whether y is logarithmic; what is not positive then lies at the lower edge.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    left, right = min(xs), max(xs)
    low, high = _range(ys, log)

    def place(point: Point) -> tuple[float, float]:
        x = (point[0] - left) / (right - left) if right > left else 0.5
        y = max(point[1], low)
        part = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return round(_SIDE * x, 1), round(_SIDE * (1 - part), 1)

    ticks = _ticks(low, high, log)
    heights = [(tick, place((left, tick))[1]) for tick in ticks]
    drawn: list[Child] = [_line((0, y), (_SIDE, y), "rule") for _, y in heights]
    for curve in curves:
        drawn += _dots(curve, place) if curve.dots else _curve(curve, place)
    label = f"{title}: " + "; ".join(_summary(curve, show) for curve in curves)
    axis = [element("span", _tick(tick), style=f"top:{y / _SIDE:.1%}") for tick, y in heights]
    ends = [element("span", _number(left)), element("span", x_name), element("span", _number(right))]
    plot = element(
        "div",
        element("div", axis, class_="y", aria_hidden="true"),
        _drawing(drawn, label),
        element("div", ends, class_="x"),
        class_="plot",
    )
    key = [[element("span", class_="key dots" if curve.dots else "key"), f" {curve.name}  "] for curve in curves]
    return element(
        "figure",
        element("figcaption", element("b", title), element("small", explained)),
        plot,
        element("p", key, class_="legend") if len(curves) > 1 else None,
        [_values(curve, x_name, show) for curve in curves if len(curve.points) > 1],
    )


def staircase(title: str, explained: str, steps: Staircase) -> Markup:
    """Which pairs of directions are frozen: a row per output direction, most important first."""
    corners, start = [(0, 0)], 0
    for stop, reach in steps.steps:
        x = round(_GRID * reach / steps.columns)
        corners += [(x, round(_GRID * start / steps.rows)), (x, round(_GRID * stop / steps.rows))]
        start = stop
    corners.append((0, _GRID))
    scaled = [(x * _SIDE / _GRID, y * _SIDE / _GRID) for x, y in dict.fromkeys(corners)]
    drawing = _drawing([_shape(scaled, "frozen")], f"{title}: {explained}")
    top, bottom = element("span", "1", style="top:4%"), element("span", f"{steps.rows:,}", style="top:96%")
    across = [element("span", "1"), element("span", "inputs"), element("span", f"{steps.columns:,}")]
    middle = element("span", "outputs", style="top:50%")
    plot = element(
        "div",
        element("div", top, middle, bottom, class_="y", aria_hidden="true"),
        drawing,
        element("div", across, class_="x", aria_hidden="true"),
        class_="plot",
    )
    return element("figure", element("figcaption", element("b", title), element("small", explained)), plot)


def _drawing(drawn: Sequence[Child], label: str) -> Markup:
    return element(
        "svg", element("title", label), drawn, viewBox=f"0 0 {_SIDE} {_SIDE}", preserveAspectRatio="none", role="img",
        aria_label=label,
    )  # fmt: skip


def _curve(curve: Curve, place: Callable[[Point], Point]) -> list[Child]:
    """A line; of very many points the means of neighbours, and between what they lie."""
    size = -(-len(curve.points) // _MOST_POINTS)
    parts = [curve.points[i : i + size] for i in range(0, len(curve.points), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    drawn: list[Child] = []
    if size > 1:
        lower = [place((x, min(y for _, y in part))) for (x, _), part in zip(means, parts, strict=True)]
        upper = [place((x, max(y for _, y in part))) for (x, _), part in zip(means, parts, strict=True)]
        drawn.append(_shape([*lower, *reversed(upper)], "band"))
    if len(means) == 1:
        return [*drawn, *_dots(curve, place)]
    line = " ".join(f"{x:g},{y:g}" for x, y in map(place, means))
    return [*drawn, element("polyline", points=line, class_="curve")]


def _dots(curve: Curve, place: Callable[[Point], Point]) -> list[Child]:
    """Lines without length have round ends, however the picture is stretched."""
    return [_line(at, at, "dot", f"{x:g}: {y:.4g}") for (x, y), at in ((p, place(p)) for p in curve.points)]


def _line(start: Point, end: Point, kind: str, title: str | None = None) -> Markup:
    (x1, y1), (x2, y2) = start, end
    told = None if title is None else element("title", title)
    return element("line", told, x1=f"{x1:g}", y1=f"{y1:g}", x2=f"{x2:g}", y2=f"{y2:g}", class_=kind)


def _shape(corners: Sequence[Point], kind: str) -> Markup:
    return element("polygon", points=" ".join(f"{x:g},{y:g}" for x, y in corners), class_=kind)


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """What y spans: wider than a point, and positive where it has to be."""
    if log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        return (low, high) if low < high else (low / 2, high * 2)
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if low >= 0 and low < 0.5 * high else low - margin), high + margin


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between both."""
    if log:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high) + 1e-9) + 1)
        for factors in (1,), (1, 3), (1, 2, 5):
            found = [factor * 10.0**power for power in powers for factor in factors]
            ticks = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
            if len(ticks) > 2:
                break
        return ticks[:: max(1, len(ticks) // 4)] or [low, high]
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return f"{value:.3g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _summary(curve: Curve, show: Callable[[float], str]) -> str:
    values = [y for _, y in curve.points]
    return (
        f"{curve.name}, {len(values)} values from {show(values[0])} to {show(values[-1])}, "
        f"least {show(min(values))}, most {show(max(values))}"
    )


def _values(curve: Curve, x_name: str, show: Callable[[float], str]) -> Markup:
    """Some of the values, the first and the last among them."""
    count = len(curve.points)
    chosen = range(count)
    if count > _MOST_LISTED:
        chosen = range(0, count, -(-count // (_MOST_LISTED - 1)))
    indices = [*chosen, *([] if chosen[-1] == count - 1 else [count - 1])]
    assert all(a < b for a, b in pairwise(indices))
    rows = [[_number(curve.points[i][0]), show(curve.points[i][1])] for i in indices]
    name = f"{curve.name}: {len(rows)} of {count} values" if len(rows) < count else f"{curve.name}: values"
    return details(name, table([x_name, curve.name], rows, name))
