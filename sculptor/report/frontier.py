"""The frontier of several continual runs as text."""

from collections.abc import Sequence

from sculptor.benchmark.frontier import Frontier, Mean
from sculptor.report.text import short_name, table

_MAX_TEXT = 14
_MOST_TEXTS = 2


def frontier_text(found: Frontier) -> str:
    """What `sculptor frontier` prints."""
    head = frontier_head(found)
    shown = len(head) - 1 - max(0, len(texts_of(found)) - _MOST_TEXTS)  # without seconds, and texts that find no place
    rows = [
        [f"{i}. {point.name}", *values[:shown]]
        for i, (point, values) in enumerate(zip(found.points, frontier_rows(found), strict=True), 1)
    ]
    more = texts_of(found)[_MOST_TEXTS:]
    return "\n".join(
        [
            table(["run", *head[:shown]], rows, keep_start=True),
            *([f"also watched, see --html or --json: {', '.join(more)}"] if more else []),
            f"{found.metric.replace('_', ' ')} on {found.split} rows of {', '.join(found.tasks)}, "
            f"{'nats per token' if found.metric == 'loss' else '%'}",
            "harm: KL(base || last), nats a token; first: at the first tokens of answers",
        ]
    )


def frontier_head(found: Frontier, texts: Sequence[str] | None = None) -> list[str]:
    """Names of the columns of `frontier_rows`; `texts` in the place of short names of the watched texts."""
    short = [short_name(name, _MAX_TEXT) for name in texts_of(found)]
    return ["AA", "BWT", "LA", "harm", "first", *(short if texts is None else texts), "seconds"]


def frontier_rows(found: Frontier) -> list[list[str]]:
    """The figures of every point, AA and harm with their deviations."""
    scale = 1 if found.metric == "loss" else 100

    def text(value: Mean | None, pattern: str, scale: float = 1, *, alone: bool = False) -> str:
        if value is None:
            return "-"
        shown = format(scale * value.mean, pattern)
        return (
            shown
            if alone or value.deviation is None
            else f"{shown} ± {format(scale * value.deviation, pattern.strip('+'))}"
        )

    figures = ".3f" if found.metric == "loss" else ".1f"
    return [
        [
            text(point.average, figures, scale),
            text(point.backward, f"+{figures}", scale, alone=True),
            text(point.learning, figures, scale, alone=True),
            text(point.harm, ".4f"),
            text(point.first, ".3f", alone=True),
            *(text(point.watched.get(name), "+.3f", alone=True) for name in texts_of(found)),
            text(point.seconds, ".0f", alone=True),
        ]
        for point in found.points
    ]


def texts_of(found: Frontier) -> list[str]:
    """Watched texts of all points, in order."""
    return list(dict.fromkeys(name for point in found.points for name in point.watched))
