"""What `verify` found, as text."""

from sculptor.analysis.verify import MatrixVerification, Verification
from sculptor.report.text import harm_lines, percent, table

_MAX_LISTED = 8
_MUCH = 0.5  # of an update, for rounding to remove
VERIFY_HEAD = ("matrix", "update", "leak", "rounding explains", "removed", "holds")


def verify_text(result: Verification) -> str:
    """What `sculptor verify` prints: matrices that fail, else those that leak most."""
    failed = [matrix for matrix in result.matrices if not matrix.holds]
    shown = sorted(failed or result.matrices, key=lambda matrix: -matrix.leak)
    rows = [verify_row(matrix) for matrix in shown[:_MAX_LISTED]]
    parts = [table(VERIFY_HEAD, rows)]
    if len(shown) > len(rows):
        parts[0] += f"\n... and {len(shown) - len(rows)} more"
    rest = (
        "identical" if result.untouched_identical else "CHANGED: " + ", ".join(result.changed_elsewhere[:_MAX_LISTED])
    )
    lines = [
        f"leak {result.leak:.2e} over {result.num_targets} matrices ({result.num_changed} changed), largest {result.max_leak:.2e}; "
        f"rounding explains {result.rounding:.2e}",
        f"the archive protects {percent(result.protected)} of these matrices",
        eaten_line(result),
        f"other tensors: {result.num_untouched}, {rest}" + (f" (matrices now {result.cast})" if result.cast else ""),
    ]
    if result.kept is not None:
        lines.append(
            f"curvature spared: {percent(result.kept)} of what an update of this size in random directions would disturb"
        )
    lines += harm_lines(result.harm, named=result.named)
    if result.eaten > _MUCH:
        lines.append("most of it is below the resolution of the dtype: save with --save-dtype float32 or train longer")
    lines += [f"DIFFERS: {what}" for what in result.differences[:_MAX_LISTED]]
    lines += [f"note: {note}" for note in result.notes]
    if result.new_tokens:
        # All of them, and likewise below: what is free is to be looked at.
        named = ", ".join(map(repr, result.new_tokens))
        lines.append(f"new tokens, whose rows are free: {len(result.new_tokens)} ({named}); old rows are compared")
    lines += [f"new tokens in old text: {line}" for line in result.old_text[:_MAX_LISTED] if not result.strict]
    if result.new_head:
        classes = ", ".join(map(repr, result.classes))
        lines.append(f"a new head, which is free: {', '.join(result.new_head)}; its classes, in order: {classes}")
    if result.also_trained:
        lines.append(f"trained without protection, by record and archive: {', '.join(result.also_trained)}")
    if result.doubt is not None:
        lines.append(
            f"its record tells of {result.num_claimed} merges, {result.num_merges} believed: {result.doubt}; verify each task "
            "against the one before"
        )
    lines.append(holds_when(result))
    if not result.passed and result.kept is not None and result.num_merges > 1:
        lines.append(
            "The guarantee is for the archive that each task was trained with; this one is of an earlier state."
        )
    lines.append(verdict_of(result))
    return "\n\n".join([*parts, "\n".join(lines)])


def eaten_line(result: Verification) -> str:
    """What rounding did to the update, by how finely the files can tell: an estimate, and none where the update is as small."""
    times = f", rounded {result.num_merges} times" if result.num_merges > 1 else ""
    if result.eaten <= _MUCH:
        return f"rounding removed {percent(result.eaten)} of the update{times}"
    size = f"{percent(result.eaten)} of the update's size or more"
    return f"rounding to the files' dtype is {size}{times}: `train` says what it removed"


def holds_when(result: Verification) -> str:
    """What is asked of a matrix."""
    return (
        "A matrix holds while its leak is at most 1.25 times what rounding explains, plus 1e-6,\n"
        "in all and in any one direction" + (", and at most 1e-3 (--strict)." if result.strict else ".")
    )


def verdict_of(result: Verification) -> str:
    """PASSED or FAILED, and why."""
    reasons = []
    if any(not matrix.holds for matrix in result.matrices):
        reasons.append(f"{sum(not matrix.holds for matrix in result.matrices)} updates reach protected pairs")
    if not result.untouched_identical:
        reasons.append(f"{len(result.changed_elsewhere)} other tensors changed")
    if result.differences:
        reasons.append(differences_of(result))
    if reasons:
        return "FAILED: " + " and ".join(reasons)
    if not (result.num_changed or result.new_tokens or result.new_head):
        return "PASSED: nothing changed; are these the same checkpoint?"
    return "PASSED" if result.eaten <= _MUCH else "PASSED, but the update is hardly larger than its rounding: see above"


def differences_of(result: Verification) -> str:
    """How much of what is no tensor differs."""
    count = len(result.differences)
    return f"{count} difference{'s' if count != 1 else ''} in what else is loaded"


def verify_row(matrix: MatrixVerification) -> list[str]:
    """Below `VERIFY_HEAD`."""
    return [
        matrix.name,
        f"{matrix.update:.1e}",
        f"{matrix.leak:.2e}",
        f"{matrix.rounding:.2e}",
        percent(matrix.eaten),
        "yes" if matrix.holds else "NO",
    ]
