"""What `train` did, as text."""

from pathlib import Path

from sculptor.jobs.train_report import TrainReport
from sculptor.report.text import harm_lines, not_targeted_lines, percent, size
from sculptor.training.loop import num_last

_MAX_LISTED = 8
# Nats a token, and at the first of an answer: some answers to what nobody taught are others.
_FELT, _FELT_FIRST = 0.05, 0.2
_MUCH = 0.25  # of an update that rounding removes: worth another dtype


def train_text(report: TrainReport, check: str | None = None) -> str:
    """What `sculptor train` prints; `check` is the command that verifies it."""
    loop = report.loop
    lines = []
    if report.num_dropped or report.num_cut:
        lines.append(
            f"Data: {report.num_examples} rows; {report.num_dropped} rows or turns dropped (completion too long), "
            f"{report.num_cut} with {'a text' if report.classes else 'the middle of the prompt'} cut"
            + ("; raise --max-length to keep more." if report.num_cut > 0.2 * report.num_examples else ".")
        )
    lines += not_targeted_lines(report.not_targeted)
    lines.append(
        f"Trained {report.num_trainable:,} free parameters for {loop.steps} steps, {loop.tokens or 0:,} tokens, "
        f"in {loop.seconds:.0f} s: loss {loop.first_loss:.3f} -> {loop.last_loss:.3f}"
        + (f", the mean of the last {last}." if (last := num_last(loop.steps)) > 1 else ".")
    )
    lines.append(_rate_line(report))
    lines.append(f"{report.placement}.")
    if loop.best_step is not None and loop.best_loss is not None:
        lines.append(f"Kept step {loop.best_step}, evaluation loss {loop.best_loss:.4f}.")
    if report.new_tokens:
        shown = ", ".join(map(repr, report.new_tokens[:_MAX_LISTED]))
        lines.append(f"New tokens, whose rows were trained: {len(report.new_tokens)} ({shown}).")
    reached = report.max_harm if loop.scaled else None
    lines += harm_lines(loop.harm, loop.steering_harm, reached, loop.named)
    if loop.scaled:
        lines.append(f"Updates were scaled back {loop.scaled:,} times to keep it there; --max-harm 0 sets no limit.")
    felt = loop.harm is not None and (loop.harm.nats > _FELT or loop.harm.first > _FELT_FIRST)
    if felt:
        lines.append(
            "Other answers have changed with it, too: `sculptor chat` with --base lets you hear how. A lower --max-harm keeps more "
            "of\nthem, --replay self mixes in what the model says, and rows of other questions show where the task ends."
        )
    if report.also_trained:
        lines.append(f"Trained without protection: {', '.join(report.also_trained[:_MAX_LISTED])}.")
    if any(matrix.update for matrix in report.matrices.values()):
        lines.append(
            f"Leak into what is protected, beyond what rounding explains: {max(0.0, report.unexplained_leak):.1e} of the update.\n"
            f"Storing the result removed {percent(report.rounding_loss)} of the update, by rounding"
            + ("; --save-dtype float32 keeps all of it." if report.rounding_loss > _MUCH else ".")
        )
    else:
        lines.append("No matrix changed.")
    added = sum(matrix.outputs_added + matrix.inputs_added for matrix in report.matrices.values())
    if report.carry == "keep":
        lines.append("The archive protects what it protected before (--carry keep).")
    elif report.carry == "merge":
        rows = "" if report.num_measured is None else f" ({report.num_measured:,} of its rows were measured)"
        lines.append(f"The archive holds what the task uses{rows} beside what was there before: see inspect.")
    elif added:
        lines.append(f"The archive gained {added:,} directions over {len(report.matrices)} matrices.")
    else:
        left = sum(matrix.num_free_next for matrix in report.matrices.values())
        lines.append(f"The archive leaves {left:,} parameters free for the next task.")
    if report.frozen:
        shown = ", ".join(report.frozen[:_MAX_LISTED]) + (", ..." if len(report.frozen) > _MAX_LISTED else "")
        lines.append(f"Frozen from now on, nothing left free: {len(report.frozen)} matrices ({shown}).")
    lines.append(f"\nWrote {report.output}: checkpoint, and in subspaces/ the archive for the next task.")
    lines.append(f"{_parts(report.output)}.")
    lines += [] if check is None else [f"To check it: {check}"]
    if report.rose:
        lines.append(
            f"The loss ended above where it began ({loop.first_loss:.3f} -> {loop.last_loss:.3f}): lower "
            f"{'--learning-rate' if report.relative_rate is None else '--relative-rate'}."
        )
    return "\n".join(lines)


def _parts(output: Path) -> str:
    """Bytes of an output's own files, and of its archives."""
    found = {"the checkpoint": 0} | {f"{path.name}/": 0 for path in sorted(output.iterdir()) if path.is_dir()}
    for path in output.rglob("*"):
        inside = path.relative_to(output).parts
        found[f"{inside[0]}/" if len(inside) > 1 else "the checkpoint"] += path.stat().st_size if path.is_file() else 0
    return ", ".join(f"{size(count)} in {name}" for name, count in found.items())


def _rate_line(report: TrainReport) -> str:
    if report.relative_rate is not None:
        unit = " of each matrix's RMS" if report.scaled else ""
        return f"Peak learning rate {report.relative_rate:.3g}{unit} (--relative-rate)."
    return f"Peak learning rate {report.learning_rate:.3g} (--learning-rate)."
