"""The page of `verify`: whether it passed, in large, by which checks, and the leak of every matrix."""

from collections.abc import Sequence

from sculptor.analysis.verify import Verification
from sculptor.report.html.figures import harm_tile, leak_map, leak_spot, update_map
from sculptor.report.html.heat import Spot
from sculptor.report.html.page import (
    Child,
    Markup,
    details,
    element,
    listed,
    listed_shortly,
    note,
    page,
    place_name,
    scrolled,
    section,
    table,
    tiles,
)
from sculptor.report.text import percent
from sculptor.report.verify import VERIFY_HEAD, differences_of, holds_when, verdict_of, verify_row, verify_text

_MOST_LISTED = 20


def verify_page(result: Verification, base: str, tuned: str, subspaces: str) -> str:
    """What `sculptor verify --html` writes."""
    names = [place_name(place) for place in (base, tuned, subspaces)]
    return page(
        "verify",
        f"{names[1]} against {names[0]}",
        element("p", f"By the archive {names[2]}.", class_="soft"),
        _verdict(result),
        element("ul", [element("li", check) for check in _checks(result)], class_="checks"),
        tiles(_tiles(result)),
        section("Changed elsewhere", *_elsewhere(result)),
        section(
            "Every matrix",
            element(
                "div",
                leak_map(
                    [leak_spot(m.name, m.role, m.update, m.leak, m.rounding, holds=m.holds) for m in result.matrices]
                ),
                update_map([Spot(m.name, m.role, m.update, f"update {m.update:.1e}") for m in result.matrices]),
                class_="grid",
            ),
            note(holds_when(result)),
            _matrices(result),
        ),
        details("As the command prints it", scrolled(element("pre", verify_text(result)), "text")),
    )


def _verdict(result: Verification) -> Markup:
    word, _, reasons = verdict_of(result).partition(": ")
    more = element("p", reasons) if reasons else None
    return element(
        "div", element("strong", word), more, class_="verdict good" if result.passed else "verdict bad", role="status"
    )


def _checks(result: Verification) -> list[Child]:
    """One line for each thing that was looked at."""
    failed = sum(not matrix.holds for matrix in result.matrices)
    total = len(result.matrices)
    checks = [
        (
            not failed,
            f"All {total} matrices stay out of what is protected."
            if not failed
            else f"{failed} of {total} matrices reach protected pairs.",
        ),
        (
            result.untouched_identical,
            f"All {result.num_untouched} other tensors are identical."
            if result.untouched_identical
            else f"{len(result.changed_elsewhere)} other tensors changed.",
        ),
        (
            not result.differences,
            "Configuration, tokenizer and whatever else is loaded are the same."
            if not result.differences
            else f"{differences_of(result)}.",
        ),
    ]
    return [
        [element("span", "✓ " if good else "✗ ", class_="good-mark" if good else "bad-mark"), text]
        for good, text in checks
    ]


def _tiles(result: Verification) -> list[tuple[str, str, str | None]]:
    rounded = f", rounded {result.num_merges} times" if result.num_merges > 1 else ""
    found: list[tuple[str, str, str | None]] = [
        ("Leak", f"{result.leak:.2e}", "of all updates together"),
        ("Rounding explains", f"{result.rounding:.2e}", "of the leak"),
        ("Largest leak", f"{result.max_leak:.2e}", "of a matrix's update"),
        ("Matrices", f"{result.num_targets:,}", f"{result.num_changed:,} changed"),
        ("Protected", percent(result.protected), "of these matrices"),
        ("Rounding", percent(result.eaten), f"of the size of the update{rounded}"),
        ("Other tensors", f"{result.num_untouched:,}", f"matrices now {result.cast}" if result.cast else "compared"),
    ]
    if result.kept is not None:
        found.append(
            (
                "Curvature spared",
                percent(result.kept),
                "of what an update of this size in random directions would disturb",
            )
        )
    return found + harm_tile(result.harm, result.named)


def _elsewhere(result: Verification) -> Sequence[Child]:
    parts: list[Child] = []
    if result.changed_elsewhere:
        parts += [element("h3", "Tensors that changed"), listed_shortly(result.changed_elsewhere)]
    if result.differences:
        parts += [element("h3", "What differs in what else is loaded"), listed(result.differences)]
    if result.new_tokens:
        parts += [element("h3", "New tokens, whose rows are free"), listed([*map(repr, result.new_tokens)])]
    if result.notes:
        parts += [element("h3", "What not every program loads"), listed(result.notes)]
    if result.old_text and not result.strict:
        parts += [element("h3", "New tokens in old text"), listed(result.old_text)]
    if result.also_trained:
        parts += [element("h3", "Trained without protection, by record and archive"), listed(result.also_trained)]
    if result.doubt is not None:
        parts.append(
            element(
                "p",
                f"Its record tells of {result.num_claimed} merges, {result.num_merges} believed: {result.doubt}; verify each task "
                "against the one before.",
            )
        )
    return parts or [element("p", "Nothing.")]


def _matrices(result: Verification) -> Child:
    """Those that fail are there to be seen."""
    ordered = sorted(result.matrices, key=lambda matrix: -matrix.leak)
    failed = [matrix for matrix in ordered if not matrix.holds]
    shown = None
    if failed:
        rest = f" The {_MOST_LISTED} that leak most; the others are below." if len(failed) > _MOST_LISTED else ""
        rows = list(map(verify_row, failed[:_MOST_LISTED]))
        shown = [
            element("h3", f"{len(failed)} matrices that do not hold.{rest}"),
            table(VERIFY_HEAD, rows, "do not hold"),
        ]
    every = table(VERIFY_HEAD, list(map(verify_row, ordered)), "all matrices")
    return [shown, details(f"All {len(ordered)} matrices, by leak", every)]
