"""The page of `frontier`: what was learned against the harm done, a number for each point."""

import math

from sculptor.benchmark.frontier import Frontier, Mean, Point
from sculptor.report.frontier import frontier_head, frontier_rows, texts_of
from sculptor.report.html.page import Child, Markup, element, page, section, table


def frontier_page(found: Frontier) -> str:
    """What `sculptor frontier --html` writes."""
    rows = [
        [f"{i}. {point.name}", *values]
        for i, (point, values) in enumerate(zip(found.points, frontier_rows(found), strict=True), 1)
    ]
    harmed = [(i, point, point.harm) for i, point in enumerate(found.points, 1) if point.harm is not None]
    first = [(i, point, point.first) for i, point in enumerate(found.points, 1) if point.first is not None]
    texts = [
        (name, [(i, point, point.watched[name]) for i, point in enumerate(found.points, 1) if name in point.watched])
        for name in texts_of(found)
    ]
    return page(
        "frontier",
        f"{_counted(len(found.points), 'way')} to learn {_counted(len(found.tasks), 'task')}",
        element(
            "p",
            f"{_unit(found)} on {found.split} rows of {', '.join(found.tasks)}: up is better, left is safer.",
            class_="soft",
        ),
        section(
            "Against harm",
            [
                _picture(found, "Harm", "KL(base || last), nats a token", harmed),
                _picture(found, "Harm at first tokens of answers", "KL(base || last), nats", first),
            ],
        )
        if harmed
        else None,
        section(
            "Against watched texts",
            [_picture(found, name, "rise of the loss, nats a token", points) for name, points in texts],
        )
        if texts
        else None,
        section("All points", table(["run", *frontier_head(found, texts_of(found))], rows, "points")),
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _unit(found: Frontier) -> str:
    return "Loss, nats per token," if found.metric == "loss" else f"{found.metric.replace('_', ' ').capitalize()}, %,"


def _picture(found: Frontier, title: str, explained: str, points: list[tuple[int, Point, Mean]]) -> Markup:
    """Numbers at (x, AA); points of one method are joined in order of x."""
    xs = [value.mean for _, _, value in points]
    ys = [point.average.mean for _, point, _ in points]
    log = min(xs) > 0 and max(xs) > 10 * min(xs)
    across = [math.log(x) for x in xs] if log else xs
    places = dict(zip([i for i, _, _ in points], zip(_spread(across), _spread(ys), strict=True), strict=True))
    lines: list[Child] = []
    for method in dict.fromkeys(point.method for _, point, _ in points):
        joined = [places[i] for i, point, _ in sorted(points, key=lambda each: each[2].mean) if point.method == method]
        corners = " ".join(f"{1000 * x:.1f},{1000 * (1 - y):.1f}" for x, y in joined)
        lines.append(element("polyline", element("title", method), points=corners, class_="curve"))
    label = f"AA against {title}, {len(points)} points; the table below has them by number"
    drawing = element(
        "svg",
        element("title", label),
        lines,
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    marks = [
        element("span", str(i), class_="mark", style=f"left:{x:.1%};top:{1 - y:.1%}", title=point.name)
        for (i, point, _), (x, y) in zip(points, places.values(), strict=True)
    ]
    scale = 1 if found.metric == "loss" else 100
    low, high = min(ys), max(ys)
    axis = [
        element("span", f"{scale * value:.3g}", style=f"top:{1 - y:.1%}")
        for value, y in zip((low, high), _spread([low, high]), strict=True)
    ]
    ends = [
        element("span", f"{min(xs):.3g}"),
        element("span", "logarithmic" if log else ""),
        element("span", f"{max(xs):.3g}"),
    ]
    return element(
        "figure",
        element("figcaption", element("b", title), element("small", f"across: {explained}; up: AA")),
        element(
            "div",
            element("div", axis, class_="y", aria_hidden="true"),
            element("div", drawing, marks, class_="field"),
            element("div", ends, class_="x"),
            class_="plot tall",
        ),
    )


def _spread(values: list[float]) -> list[float]:
    """Places between 0.06 and 0.94, so that numbers at the edge are whole."""
    low, high = min(values), max(values)
    return [0.06 + 0.88 * ((value - low) / (high - low) if high > low else 0.5) for value in values]
