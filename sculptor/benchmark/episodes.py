"""MAMF (arXiv 2203.04904): before a task, sub-tasks drawn uniformly, each learned by plain first-order steps.

A sub-task is one of the tasks seen so far, restricted to a few of its labels: rows with other completions are left out, and
where the prompt lists the labels, it lists the drawn ones alone.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sculptor.benchmark.contenders import plainly
from sculptor.benchmark.plan import Plan, PlannedTask
from sculptor.data.row_types import CompletionRow
from sculptor.data.rows import read_rows, unweighted
from sculptor.errors import SettingsError
from sculptor.training.settings import TrainSettings


@dataclass(frozen=True, eq=False, slots=True)
class Episode:
    """A sub-task: its rows, and how it is trained."""

    rows: Sequence[dict[str, Any]]
    settings: TrainSettings


def episodes_of(plan: Plan, task: PlannedTask, settings: TrainSettings) -> tuple[list[Episode], TrainSettings]:
    """The sub-tasks before a task, and how that itself is trained: in all as many steps as without them, half of them its own.

    Raises:
        SettingsError: if a task has no labels to draw from, or too few steps.
    """
    (settings, total), count = plainly(settings, task), plan.adapter.episodes
    each = total // (2 * count)
    if not each:
        raise SettingsError(
            f"--method mamf: {total} steps of task {task.name} are too few for {count} episodes in half of them; "
            "set [adapter] episodes or [train] max_steps"
        )
    names = [one.name for one in plan.tasks]
    known = plan.tasks[: names.index(task.name) + 1]
    chance = random.Random(f"{plan.train.seed} {task.name}")
    drawn = [chance.choice(known) for _ in range(count)]
    shared = replace(settings, max_steps=each, columns=None)
    episodes = [Episode(_sub_task(plan, one, chance), shared) for one in drawn]
    return episodes, replace(settings, max_steps=total - count * each)


def check_episodes(plan: Plan) -> None:
    """Refuses, before the first task, tasks that sub-tasks cannot be drawn from.

    Raises:
        SettingsError: naming one.
    """
    for task in plan.tasks:
        _rows_and_labels(plan, task)


def _sub_task(plan: Plan, task: PlannedTask, chance: random.Random) -> list[dict[str, Any]]:
    """Rows of a task with a few of its labels."""
    rows, labels = _rows_and_labels(plan, task)
    names = [label.strip() for label in labels]
    chosen = set(chance.sample(names, min(plan.adapter.ways, len(names))))
    return [
        {"prompt": shorten(row.prompt, names, chosen), "completion": row.completion}
        for row in rows
        if row.completion.strip() in chosen
    ]


def _rows_and_labels(plan: Plan, task: PlannedTask) -> tuple[list[CompletionRow], tuple[str, ...]]:
    settings = plan.train_settings(task)
    read = read_rows([unweighted(item) for item in task.data], settings.max_rows, settings.columns)
    rows = [row for row in read if isinstance(row, CompletionRow)]
    labels = task.labels or tuple(dict.fromkeys(row.completion.strip() for row in rows))
    if not rows or len(labels) > _MOST_LABELS:
        raise SettingsError(
            f"--method mamf: task {task.name} has no labels to draw sub-tasks from: its rows need completions, at most "
            f"{_MOST_LABELS} different ones"
        )
    return rows, labels


_MOST_LABELS = 32


def shorten(prompt: str, labels: Sequence[str], chosen: set[str]) -> str:
    """A prompt that lists all labels, separated by commas, lists the chosen ones alone, in the same order."""
    one = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(rf"(?:{one})(?:, (?:{one})){{{len(labels) - 1}}}", prompt)
    if found is None:
        return prompt
    kept = [label for label in re.findall(one, found[0]) if label in chosen]
    return prompt[: found.start()] + ", ".join(kept) + prompt[found.end() :]
