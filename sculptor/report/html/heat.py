"""Heat maps: tables whose cells have a colour beside their number, so that nobody needs to see colours."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sculptor.jobs.analyze_report import block_of
from sculptor.report.html.page import Markup, element, scrolled
from sculptor.report.html.style import STEPS

_MOST_NAMED = 8
_LONGEST = 14  # characters of a head


class Head(NamedTuple):
    """Of a row or a column: what stands there, and its whole name."""

    short: str
    whole: str

    @classmethod
    def of(cls, name: str) -> "Head":
        """A name, without its middle where it is long: names often differ at their ends."""
        long = len(name) > _LONGEST
        return cls(f"{name[: _LONGEST // 2 - 1]}…{name[-_LONGEST // 2 :]}" if long else name, name)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes:
        text: its number.
        level: from 0 to 1, where on the scale; None for no colour.
        title: the whole story.
        bad: it must not be so.
        own: it stands out, by a frame.
    """

    text: str
    level: float | None
    title: str
    bad: bool = False
    own: bool = False


@dataclass(frozen=True, slots=True)
class Spot:
    """A figure of one matrix: `value` None where there is none, `told` in words."""

    name: str
    role: str
    value: float | None
    told: str
    bad: bool = False


def heat_map(
    caption: str,
    explained: str,
    columns: Sequence[Head],
    rows: Iterable[tuple[Head, Sequence[Cell | None]]],
    ends: tuple[str, str],
    corner: str,
) -> Markup:
    """A table with colours.

    Args:
        caption: what is shown, and `explained` how.
        columns: their heads.
        rows: heads and cells, None for an empty one.
        ends: what the palest and the strongest colour stand for.
        corner: what the rows are.
    """
    heads = [element("th", element("span", head.short), scope="col", title=head.whole) for head in columns]
    body = [
        element("tr", element("th", head.short, scope="row", title=head.whole), list(map(_cell, cells)))
        for head, cells in rows
    ]
    first = element("th", element("span", corner), scope="col", class_="corner")
    whole = element("table", element("thead", element("tr", first, heads)), element("tbody", body), class_="heat")
    return element(
        "figure",
        element("figcaption", element("b", caption), element("small", explained)),
        scrolled(whole, caption),
        _legend(ends),
    )


def by_block_and_role(
    caption: str,
    explained: str,
    spots: Sequence[Spot],
    show: Callable[[float], str],
    level: Callable[[float], float],
    ends: tuple[str, str],
    *,
    largest: bool = False,
) -> list[Markup]:
    """Heat maps of matrices, one for each stack of blocks; several in one cell (experts) show their mean, or the largest."""
    stacks: dict[str, dict[str, dict[str, list[Spot]]]] = {}
    for spot in spots:
        block = block_of(spot.name, spot.role)
        stack = block.rpartition(".")[0] if block.rpartition(".")[2].isdigit() else ""
        stacks.setdefault(stack, {}).setdefault(block, {}).setdefault(spot.role, []).append(spot)
    maps = []
    for stack, blocks in stacks.items():
        told = explained
        if any(len(inside) > 1 for cells in blocks.values() for inside in cells.values()):
            told += f" Of several matrices in a cell: {'the largest' if largest else 'the mean'}."
        roles = list(dict.fromkeys(role for cells in blocks.values() for role in cells))
        rows = [
            (
                Head(block.removeprefix(f"{stack}."), block),
                [_together(cells[role], show, level, largest) if role in cells else None for role in roles],
            )
            for block, cells in blocks.items()
        ]
        heads = [Head(_shortest(role, roles), role) for role in roles]
        maps.append(heat_map(f"{caption}: {stack}" if len(stacks) > 1 else caption, told, heads, rows, ends, "block"))
    return maps


def _together(
    spots: Sequence[Spot], show: Callable[[float], str], level: Callable[[float], float], largest: bool
) -> Cell:
    values = [spot.value for spot in spots if spot.value is not None]
    told = [f"{spot.name}: {spot.told}" for spot in sorted(spots, key=lambda spot: not spot.bad)]
    if len(spots) > 1 and values:
        told.insert(0, f"{len(spots)} matrices, from {show(min(values))} to {show(max(values))}")
    if len(told) > _MOST_NAMED:
        told[_MOST_NAMED:] = [f"and {len(told) - _MOST_NAMED} more"]
    title, bad = "\n".join(told), any(spot.bad for spot in spots)
    if not values:
        return Cell("✗" if bad else "–", None, title, bad)
    value = max(values) if largest else sum(values) / len(values)
    return Cell(("✗" if bad else "") + show(value), level(value), title, bad)


def _cell(cell: Cell | None) -> Markup:
    if cell is None:
        return element("td")
    kind = "none" if cell.level is None else f"h{round(min(1.0, max(0.0, cell.level)) * (STEPS - 1))}"
    marks = [kind, *(["bad"] if cell.bad else []), *(["own"] if cell.own else [])]
    return element("td", cell.text, class_=" ".join(marks), title=cell.title)


def _legend(ends: tuple[str, str]) -> Markup:
    ramp = element("span", [element("i", class_=f"h{i}") for i in range(STEPS)], class_="ramp", aria_hidden="true")
    return element("p", ends[0], ramp, ends[1], class_="legend")


def _shortest(role: str, roles: Sequence[str]) -> str:
    """The end of a role's path that tells it from the others."""
    parts = role.split(".")
    ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
    return next(
        (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in roles if other != role)), role
    )
