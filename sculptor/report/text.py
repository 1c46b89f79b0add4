"""Results as tables of at most 100 columns."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from sculptor.archive.manifest import FrozenMatrices, SourceFacts
from sculptor.jobs.analyze_report import AnalyzeReport, RoleSummary
from sculptor.methods.method import Terms
from sculptor.model.harm import Harm, NamedHarm
from sculptor.tasks.demo import DemoReport
from sculptor.tasks.inspect_archive import Inspection

WIDTH = 100
_MAX_LISTED = 8
_NEAR_BUDGET = 0.005
COMPARISON_LEGEND = (
    "a/b: directions here / in the other; overlap: share of the smaller inside the larger; angle: largest"
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, keep_start: bool = False) -> str:
    """Columns as wide as they need to be; the first is left-aligned and shortened to fit 100 columns.

    Of names of matrices the end tells them apart; `keep_start` is for those that begin with what does.
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = [_line(head, widths, keep_start), "  ".join("-" * width for width in widths)]
    return "\n".join([*lines, *(_line(row, widths, keep_start) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int], keep_start: bool) -> str:
    first, width = cells[0], widths[0]
    if len(first) > width:
        first = first[: width - 1] + "…" if keep_start else "…" + first[-(width - 1) :]
    rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([first.ljust(widths[0]), *rest]).rstrip()


def size(num_bytes: int) -> str:
    """Bytes for people."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.1f} %"


def analyze_text(report: AnalyzeReport) -> str:
    """What `sculptor analyze` prints."""
    lines = [roles_table(report.roles, report.terms)]
    lines += not_targeted_lines(report.not_targeted)
    ratio = report.archive_bytes / max(1, report.checkpoint_bytes)
    if report.calibration:
        lines += [
            f"Calibrated on {_called(c)}: {c.rows:,} rows, {c.tokens:,} tokens, {c.tokens_with_loss:,} of them with loss."
            for c in report.calibration
        ]
        if min(c.tokens_with_loss for c in report.calibration) < report.most_directions:
            lines.append(
                f"That is fewer than the {report.most_directions:,} directions stored of a matrix: take more rows, or the "
                "figures above say little."
            )
    if report.budget is not None and abs(report.free_share - report.budget) > _NEAR_BUDGET:
        lines.append(
            f"Asked for {percent(report.budget)} free, {percent(report.free_share)} is: directions that are not stored freeze "
            "in blocks only;\na larger --keep comes closer."
        )
    lines.append(
        f"\n{report.num_matrices} matrices, basis {report.basis}, constraint {report.constraint}, "
        f"{size(report.archive_bytes)} ({ratio:.2f} x the checkpoint).\nWrote {report.output}."
    )
    return "\n".join(lines)


def roles_table(roles: Sequence[RoleSummary], terms: Terms) -> str:
    """One line per role and one for all."""
    return table(*roles_rows(roles, terms)) + f"\nfree share: entries of the update that may change; {terms.note}"


def roles_rows(roles: Sequence[RoleSummary], terms: Terms) -> tuple[list[str], list[list[str]]]:
    """Head and rows of that table."""
    rows = list(map(_summary_row, roles))
    matrices, free, parameters = (
        sum(values) for values in zip(*((r.num_matrices, r.num_free, r.num_parameters) for r in roles), strict=True)
    )
    preserved = sum(r.preserved * r.num_matrices for r in roles) / matrices
    if terms.adds:
        preserved = 1 - free / parameters
    energy = sum(r.energy * r.num_matrices for r in roles) / matrices
    rows.append(["all", str(matrices), percent(preserved), percent(energy), f"{free:,}", percent(free / parameters)])
    return _summary_head("role", terms), rows


def blocks_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of blocks."""
    return _summary_head("block", found.terms), list(map(_summary_row, found.blocks))


def _summary_head(first: str, terms: Terms) -> list[str]:
    return [first, "matrices", terms.share, terms.held, "free parameters", "free share"]


def _summary_row(of: RoleSummary) -> list[str]:
    return [
        of.role,
        str(of.num_matrices),
        percent(of.preserved),
        percent(of.energy),
        f"{of.num_free:,}",
        percent(of.num_free / of.num_parameters),
    ]


def not_targeted_lines(not_targeted: Sequence[FrozenMatrices]) -> list[str]:
    """What stays frozen, by reason."""
    lines = []
    for reason in dict.fromkeys(item.reason for item in not_targeted):
        chosen = [item for item in not_targeted if item.reason == reason]
        lines.append(f"Not targeted, frozen ({reason}):")
        lines += [
            f"  {item.role}: {item.num_tensors} x, {item.num_parameters:,} parameters" for item in chosen[:_MAX_LISTED]
        ]
        if len(chosen) > _MAX_LISTED:
            lines.append(f"  and {len(chosen) - _MAX_LISTED} more roles")
    return lines


def harm_text(harm: Harm, new: str = "new") -> str:
    """The mean over all tokens, and of what."""
    return f"{harm.nats:.4f} ± {harm.error:.4f} nats a token, KL(base || {new}), on {harm.num_samples:,} samples"


def first_text(harm: Harm) -> str:
    """The mean over the first tokens."""
    return f"{harm.first:.4f} ± {harm.first_error:.4f}"


def shown_name(name: str) -> str:
    """A file with the folders that tell it apart; reports of before have whole paths, which are nobody's business."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def short_name(name: str, most: int) -> str:
    """What heads a column of a file: its name without the ending, cut; where folders tell it apart, from the other side."""
    short = str(PurePath(shown_name(name)).with_suffix(""))
    return short[-most:] if "/" in short else short[:most]


def harm_lines(
    harm: Harm | None, steering: float | None = None, limit: float | None = None, named: Sequence[NamedHarm] = ()
) -> list[str]:
    """What a model lost of its first base's own predictions."""
    if harm is None:
        return []
    lines = [
        f"Harm to what the first base says by itself: {harm_text(harm)}.",
        f"Of it at the first token of each, by which an answer begins: {first_text(harm)}.",
    ]
    if steering is not None and limit is not None:
        lines.append(f"On the samples that steered it: {steering:.4f}, of {limit:.3g} allowed (--max-harm).")
    return lines + list(map(named_line, named))


def named_line(found: NamedHarm) -> str:
    """What became of a text that was protected by name."""
    harm = found.harm
    return (
        f"{found.name}: loss {found.rise:+.4f} ± {found.rise_error:.4f}, KL {harm.nats:.4f} ± {harm.error:.4f} nats a token, on "
        f"{harm.num_samples} rows kept"
    )


def inspect_text(found: Inspection, every: bool = False) -> str:
    """What `sculptor inspect` prints; `every`: the matrices, too."""
    head = [
        f"{found.path}: {found.model_class}, basis {found.basis}, constraint {found.constraint}, "
        f"{len(found.matrices)} matrices, {size(found.num_bytes)}",
        f"free: {found.num_free:,} of {found.num_parameters:,} ({percent(found.num_free / found.num_parameters)}); "
        f"written by {found.created_by}",
    ]
    if found.belongs:
        head.append("belongs to the model: every matrix is, byte for byte, the one that was analyzed")
    head += [f"task {i}: {task.name} ({task.kind})" for i, task in enumerate(found.tasks)]
    head += list(map(_source_line, (source for task in found.tasks for source in task.calibration if source.protects)))
    parts = ["\n".join(head), roles_table(found.roles, found.terms)]
    parts.append(table(*blocks_rows(found)))
    parts += [_shares_table(found)] if found.shares else []
    parts += ["\n".join(not_targeted_lines(found.not_targeted))] if found.not_targeted else []
    if found.comparison is not None:
        parts.append(table(*comparison_rows(found)) + f"\n{COMPARISON_LEGEND}")
    if every:
        parts.append(table(*matrices_rows(found)))
    return "\n\n".join(parts)


def _called(source: SourceFacts) -> str:
    return source.source + (f" (protects {source.protects})" if source.protects else "")


def _source_line(source: SourceFacts) -> str:
    told = f"{source.rows:,} rows, {source.tokens:,} tokens, weight {source.weight:g}"
    return f"protects {source.protects}: {source.source}, {told}"


def _shares_table(found: Inspection) -> str:
    """One line per task: what is protected of it, its part of all that is, and its overlap with the others."""
    shown = list(enumerate(found.shares))[-_MAX_LISTED:]
    rows = [
        [
            f"{i} {share.name}",
            percent(share.protected),
            percent(share.own),
            *(f"{share.overlaps[j]:.2f}" for j, _ in shown),
        ]
        for i, share in shown
    ]
    note = (
        "protected: of the task's own curvature; part: of all that is protected; ~i: overlap with task i\n"
        f"free capacity left: {percent(found.num_free / found.num_parameters)} of all pairs"
    )
    return table(["task", "protected", "part", *(f"~{i}" for i, _ in shown)], rows) + f"\n{note}"


def matrices_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of matrices."""
    rows = [
        [
            matrix.name,
            "x".join(map(str, matrix.shape)),
            percent(matrix.preserved),
            percent(matrix.energy),
            percent(matrix.free_share),
            *([] if found.shares else [" ".join(f"{task}:{max(counts)}" for task, counts in matrix.added.items())]),
        ]
        for matrix in found.matrices
    ]
    head = ["matrix", "shape", "preserved", "curvature" if found.shares else "energy", "free"]
    return head if found.shares else [*head, "task:directions"], rows


def comparison_rows(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of another archive's angles."""
    assert found.comparison is not None

    def cell(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.2f}{unit}"

    rows = [
        [
            c.name,
            f"{c.output.first}/{c.output.second}",
            cell(c.output.overlap, ""),
            cell(c.output.largest_angle, "°"),
            f"{c.input.first}/{c.input.second}",
            cell(c.input.overlap, ""),
            cell(c.input.largest_angle, "°"),
        ]
        for c in found.comparison
    ]
    return ["matrix", "outputs", "overlap", "angle", "inputs", "overlap", "angle"], rows


def demo_text(report: DemoReport, kept: bool) -> str:
    """What `sculptor demo` prints."""
    rows = [
        [
            row.name,
            percent(row.kept),
            percent(row.learned),
            "-" if row.verified is None else "passed" if row.verified else "FAILED",
        ]
        for row in report.rows
    ]
    parts = [
        f"A model of {report.num_parameters:,} parameters that knows {report.num_old} facts was taught {report.num_new} more.",
        table(["", f"old facts kept ({report.num_old})", f"new facts learned ({report.num_new})", "verify"], rows),
        f"All runs: same data, steps and learning rate. Largest leak into the protected pairs: {report.leak:.1e} of the update.",
    ]
    if kept:
        parts.append(f"Everything is in {report.output}; look at it with\n" + "\n".join(_demo_commands(report.output)))
    return "\n\n".join(parts)


def _demo_commands(output: Path) -> list[str]:
    return [
        f"  sculptor inspect {output / 'protected' / 'subspaces'}",
        f"  sculptor verify {output / 'model'} {output / 'protected'} --subspaces {output / 'protected-subspaces'}",
        f"  sculptor evaluate {output / 'protected'} --data {output / 'old.jsonl'}",
    ]
