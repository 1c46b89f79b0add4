"""The page of `inspect`: how much is protected where, and what that looks like in a few matrices."""

from sculptor.archive.store import Archive
from sculptor.methods.rule import Directed, Spectrum
from sculptor.methods.staircase import StaircaseRule
from sculptor.report.html.curves import Curve, chart, staircase
from sculptor.report.html.figures import share_map
from sculptor.report.html.heat import Cell, Head, heat_map
from sculptor.report.html.page import (
    Child,
    Markup,
    details,
    element,
    listed,
    note,
    page,
    place_name,
    section,
    table,
    tiles,
)
from sculptor.report.plot import middles
from sculptor.report.text import (
    COMPARISON_LEGEND,
    blocks_rows,
    comparison_rows,
    matrices_rows,
    not_targeted_lines,
    percent,
    roles_rows,
    size,
)
from sculptor.tasks.inspect_archive import Inspection

_MOST_DRAWN = 12
_MOST_COMPARED = 20
_LEGEND = (
    "Curves: how much each direction carries. Areas: which pairs of an output and an input direction are frozen, a row per output "
    "direction, both in order of importance."
)
_LEAST_DRAWN = 1e-6  # of the largest value of a spectrum


def inspect_page(found: Inspection, archive: Archive) -> str:
    """What `sculptor inspect --html` writes; reads the bases of one matrix per role."""
    terms = found.terms
    every = [(matrix.name, matrix.role) for matrix in found.matrices]
    frozen = not_targeted_lines(found.not_targeted)
    return page(
        "inspect",
        place_name(found.path),
        element(
            "p", f"What the archive protects of {found.model_class}; written by {found.created_by}.", class_="soft"
        ),
        tiles(_tiles(found)),
        section(
            "How much is protected",
            element(
                "div",
                share_map(
                    terms.share.capitalize(),
                    "Of each matrix.",
                    [(*who, matrix.preserved) for who, matrix in zip(every, found.matrices, strict=True)],
                ),
                share_map(
                    terms.held.capitalize(),
                    "Of each matrix, what the protected part holds.",
                    [(*who, matrix.energy) for who, matrix in zip(every, found.matrices, strict=True)],
                ),
                share_map(
                    "Free share",
                    "Entries of the update that may change.",
                    [(*who, matrix.free_share) for who, matrix in zip(every, found.matrices, strict=True)],
                ),
                class_="grid",
            ),
            table(*roles_rows(found.roles, terms), "by role"),
            note(f"free share: entries of the update that may change; {terms.note}"),
            details("By block", table(*blocks_rows(found), "by block")),
            details("Every matrix", table(*matrices_rows(found), "every matrix")),
        ),
        section("Tasks", _history(found), _tasks(found) if found.shares else None),
        section("One matrix of each role, from the middle of the model", _examples(archive)),
        section("Against the other archive", note(COMPARISON_LEGEND), _comparison(found)) if found.comparison else None,
        section("Not targeted", listed(frozen)) if frozen else None,
    )


def _tiles(found: Inspection) -> list[tuple[str, str, str | None]]:
    tiles: list[tuple[str, str, str | None]] = [
        ("Free", percent(found.num_free / found.num_parameters), f"{found.num_free:,} of {found.num_parameters:,}"),
        ("Matrices", f"{len(found.matrices):,}", f"{len(found.blocks):,} blocks, {len(found.roles):,} roles"),
        ("Size", size(found.num_bytes), None),
        ("Basis", found.basis, f"constraint {found.constraint}"),
    ]
    if found.belongs:
        tiles.append(("Model", "belongs", "every matrix is, byte for byte, the one that was analyzed"))
    return tiles


def _history(found: Inspection) -> Markup:
    return element("ol", [element("li", f"{task.name} ({task.kind})") for task in found.tasks], start="0")


def _tasks(found: Inspection) -> Child:
    heads = [Head.of(f"{i} {share.name}") for i, share in enumerate(found.shares)]
    rows = [
        [head.whole, percent(share.protected), percent(share.own)]
        for head, share in zip(heads, found.shares, strict=True)
    ]
    overlaps = [
        (head, [Cell(f"{value:.2f}", value, f"{head.whole} and {other.whole}: {value:.3f}") for other, value in pairs])
        for head, share in zip(heads, found.shares, strict=True)
        for pairs in [list(zip(heads, share.overlaps, strict=True))]
    ]
    return [
        table(["task", "protected", "part"], rows, "tasks"),
        note("protected: of the task's own curvature; part: of all that is protected"),
        None
        if len(heads) == 1
        else heat_map(
            "Overlap of tasks", "1 for the same directions, 0 for none in common.", heads, overlaps, ("0", "1"), "task"
        ),
    ]


def _comparison(found: Inspection) -> Child:
    """Matrices that were turned most come first; a model has hundreds."""
    head, rows = comparison_rows(found)
    compared = sorted(
        zip(found.comparison or (), rows, strict=True),
        key=lambda each: -max(side.largest_angle or 0.0 for side in (each[0].output, each[0].input)),
    )
    ordered = [row for _, row in compared]
    every = details(f"All {len(ordered)} matrices", table(head, ordered, "all compared"))
    return [table(head, ordered[:_MOST_COMPARED], "turned most"), every if len(ordered) > _MOST_COMPARED else None]


def _examples(archive: Archive) -> Child:
    drawn: list[Child] = []
    for role, name in list(middles(archive).items())[:_MOST_DRAWN]:
        entry = archive.read(name)
        found = entry.rule.spectrum_of(entry.tensors) if isinstance(entry.rule, Directed) else None
        if found is not None and float(found.values[0]) > 0:
            drawn.append(_spectrum(role, name, found))
        if isinstance(entry.rule, StaircaseRule):
            frozen = 1 - entry.rule.staircase.num_free / (entry.rule.shape[0] * entry.rule.shape[1])
            drawn.append(staircase(role, f"{name}: {percent(frozen)} of all pairs are frozen", entry.rule.staircase))
    if not drawn:
        return element("p", "Its rules tell no directions apart.")
    return [note(_LEGEND), element("div", drawn, class_="grid small")]


def _spectrum(role: str, name: str, found: Spectrum) -> Markup:
    relative = (found.values / found.values[0]).tolist()
    count = min(len(relative), found.protected)
    curves = [Curve(found.what.lower(), [(i + 1.0, max(value, _LEAST_DRAWN)) for i, value in enumerate(relative)])]
    if count:
        curves.append(Curve("last protected", [(float(count), max(relative[count - 1], _LEAST_DRAWN))], dots=True))
    told = f"{name}: {found.what.lower()}, relative to the first; {count:,} of {found.dim:,} directions protected"
    return chart(role, told, curves, "direction", lambda value: f"{value:.2e}", log=True)
