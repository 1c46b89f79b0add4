"""What edits did, as text."""

from sculptor.jobs.edit_report import Choice, EditReport, RoleChange
from sculptor.report.text import percent, table
from sculptor.tasks.prune import PrunedRole, PruneReport

_MAX_LISTED = 8


def edit_text(report: EditReport) -> str:
    """What `sculptor edit lines|interpolate|project|threshold` prints."""
    parts = [] if report.choice is None else [_choice_text(report.choice)]
    rows = [_role_row(role) for role in (*report.roles, report.all)]
    note = "difference: of TUNED from BASE, against the size of BASE; stays: of its norm, in what is written"
    parts.append(table(["role", "tensors", "difference", "stays"], rows) + f"\n{note}")
    lines = []
    if report.all.difference == 0:
        lines.append("No tensor differs: are these the same checkpoint?")
    lines += [f"Not taken of TUNED: {what}" for what in report.not_taken[:_MAX_LISTED]]
    numbers = ", ".join(f"{name} {value:g}" for name, value in report.numbers.items())
    lines.append(f"Edit {report.command} with {numbers}; everything else is {report.copied.upper()}'s.")
    lines.append("Nothing was written." if report.output is None else f"Wrote {report.output}.")
    return "\n\n".join([*parts, "\n".join(lines)])


def _role_row(role: RoleChange) -> list[str]:
    stays = percent(role.stays) if role.difference else "-"
    return [role.role, str(role.num_tensors), f"{role.difference:.1e}", stays]


def _choice_text(choice: Choice) -> str:
    """The curve: every candidate, and which was taken."""

    def task(value: float) -> str:
        return percent(value) if choice.measure == "accuracy" else f"{value:.4f}"

    soft = any(point.soft is not None for point in choice.points)
    blank = ["-"] if soft else []
    rows = [["BASE", *blank, task(choice.base[0]), f"{choice.base[1]:.4f}", "0.0 %", "100.0 %", "1.000", ""]]
    rows.append(["TUNED", *blank, task(choice.tuned[0]), f"{choice.tuned[1]:.4f}", "100.0 %", "0.0 %", "2.000", ""])
    for i, point in enumerate(choice.points):
        shown = [f"{point.alpha:.3g}", *([f"{point.soft:.3g}"] if soft and point.soft is not None else [])]
        measured = [
            task(point.task),
            f"{point.watch:.4f}",
            percent(point.kept),
            percent(point.back),
            f"{point.score:.3f}",
        ]
        rows.append([*shown, *measured, "<" if i == choice.best else ""])
    head = ["alpha", *(["soft"] if soft else []), f"task {choice.measure}", "watched loss", "kept", "back", "score", ""]
    note = "kept: of what tuning gained on the task; back: of what it lost on the text\nscore: 2 kept + back; the largest is taken"
    return table(head, rows) + f"\n{note}"


def prune_text(report: PruneReport) -> str:
    """What `sculptor edit prune` prints."""
    rows = [_pruned_row(role) for role in (*report.roles, report.all)]
    by = "least curvature first (EsaCL-style: 1/2 h w^2, h from the archive)"
    note = "norm removed: of ||W||; curvature removed: of sum h w^2, half of which is the predicted damage"
    head = ["role", "matrices", "zero", "norm removed", "curvature removed"]
    if report.by == "magnitude":
        by, note, head = "smallest weights first", "norm removed: of ||W||", head[:-1]
    lines = [f"Removed {percent(report.sparsity)} of every matrix, {by}."]
    lines.append("Nothing was written." if report.output is None else f"Wrote {report.output}.")
    return table(head, rows) + f"\n{note}\n\n" + "\n".join(lines)


def _pruned_row(role: PrunedRole) -> list[str]:
    row = [role.role, str(role.num_matrices), percent(role.num_zero / role.num_parameters), percent(role.norm)]
    return row if role.curvature is None else [*row, percent(role.curvature)]
