"""Choosing an edit's free numbers: candidates are measured on rows of the task, and on text that shows general ability.

    kept = (task(W) - task(W0)) / (task(W1) - task(W0)),    back = (loss(W1) - loss(W)) / (loss(W1) - loss(W0))

The one with the largest 2 kept + back is taken, the trade-off of LiNeS. Candidates are made in a model in memory, tensor by
tensor, as they would be written; what an edit keeps of each matrix waits in host memory, in float32.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sculptor.data.rows import Row, digest_rows
from sculptor.edits.difference import Edit
from sculptor.edits.interpolate import Even
from sculptor.edits.pairs import Pairs
from sculptor.edits.passes import EditPass
from sculptor.edits.settings import Choose
from sculptor.errors import EditError
from sculptor.evaluation.rows import Evaluation, Generation, check_finite, evaluate_rows, read_evaluation_rows
from sculptor.jobs.edit_report import Choice, Measure, Point
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.put import put_tensors
from sculptor.progress import Progress, silent


class Measured(NamedTuple):
    """What a model can do: on the task, by accuracy or loss, and the loss of the watched text."""

    task: float
    watch: float
    by: Measure


@dataclass(frozen=True, eq=False)
class Trial:
    """A model in memory that takes one candidate after another, and the rows that it is measured on."""

    pairs: Pairs
    loaded: LoadedModel
    rows: Sequence[Row]
    text: Sequence[Row]
    choose: Choose
    saved: torch.dtype | None
    kept: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)

    def measure(self, edit: Edit) -> Measured:
        """Puts a candidate into the model, and measures it."""
        made = EditPass(self.pairs, edit, self.loaded.device, self.saved, kept=self.kept)
        put_tensors(self.loaded, self.pairs.source, self.pairs.by_name, made.tensor)
        task, watch = (self._evaluate(rows) for rows in (self.rows, self.text))
        for name, found in (("the rows", task), ("the watched text", watch)):
            check_finite(self.pairs.tuned.path, f"{name}, or an edit of it does", found.loss)
        assert task.loss is not None
        assert watch.loss is not None
        if task.accuracy is None:
            return Measured(task.loss, watch.loss, "loss")
        return Measured(task.accuracy, watch.loss, "accuracy")

    def _evaluate(self, rows: Sequence[Row]) -> Evaluation:
        length, size = self.choose.max_length, self.choose.batch_size
        return evaluate_rows(
            self.loaded, rows, None, length, size, generation=Generation(exact_match=False), progress=silent
        )


def open_trial(
    pairs: Pairs, choose: Choose, device: torch.device, saved: torch.dtype | None
) -> tuple[Trial, dict[str, Any]]:
    """Loads model and rows; and the rows' names and digests, for the record.

    Raises:
        SculptorError: if the model or the rows cannot be used.
    """
    rows, text = read_evaluation_rows(choose.choose, None), read_evaluation_rows(choose.watch, None)
    facts = {
        name: {"files": [Path(file).name for file in files], "rows_sha256": digest_rows(found)}
        for name, files, found in (("rows", choose.choose, rows), ("watched", choose.watch, text))
    }
    return Trial(pairs, load_model(pairs.source, device), rows, text, choose, saved), facts


def choose_best(
    trial: Trial,
    make: Callable[[float, float | None], Edit],
    alphas: Sequence[float],
    softs: Sequence[float | None],
    progress: Progress,
) -> Choice:
    """Measures the base, the tuned model and every candidate.

    Args:
        trial: the model and the rows.
        make: the edit of an alpha and a soft.
        alphas, softs: what is tried of either.
        progress: makes progress bars.

    Raises:
        EditError: if tuning gained nothing on the task, or lost nothing on the text.
    """
    with closing(progress(total=2 + len(softs) * len(alphas), desc="choose", unit="candidate")) as bar:
        ends = []
        for alpha in (0.0, 1.0):
            ends.append(trial.measure(Even(alpha)))
            bar.update(1)
        base, tuned = ends
        _check_ends(base, tuned)
        points = []
        for soft in softs:
            trial.kept.clear()
            for alpha in alphas:
                found = trial.measure(make(alpha, soft))
                kept = (found.task - base.task) / (tuned.task - base.task)
                back = (tuned.watch - found.watch) / (tuned.watch - base.watch)
                points.append(Point(alpha, soft, found.task, found.watch, kept, back))
                bar.update(1)
    best = max(range(len(points)), key=lambda i: (points[i].score, points[i].alpha))
    return Choice(base.by, (base.task, base.watch), (tuned.task, tuned.watch), tuple(points), best)


def _check_ends(base: Measured, tuned: Measured) -> None:
    """Whether there is something to keep, and something to bring back."""
    gained = tuned.task - base.task if base.by == "accuracy" else base.task - tuned.task
    if not gained > 0:
        raise EditError(
            f"--choose: TUNED is no better than BASE on these rows ({base.by} {tuned.task:.4f} against {base.task:.4f}): nothing "
            "to keep; use rows of the task it was tuned on"
        )
    if not tuned.watch > base.watch:
        raise EditError(
            f"--watch: TUNED is no worse than BASE on this text (loss {tuned.watch:.4f} against {base.watch:.4f}): nothing to "
            "bring back; use TUNED as it is, or another text"
        )
