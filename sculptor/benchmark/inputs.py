"""Everything that a plan trains, calibrates and evaluates on, read before any of it is used."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sculptor.benchmark.plan import Plan, Split
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.rows import Row, digest_rows, local_files, names_of, read_sources
from sculptor.errors import SettingsError
from sculptor.evaluation.rows import read_evaluation_rows
from sculptor.methods.settings import is_self
from sculptor.training.settings import CLASSIFICATION
from sculptor.validation import file_digest


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """The rows of a plan.

    Attributes:
        rows: evaluated, by task.
        watched: by name.
        evaluated_digest: of both.
        trained_digest: of what is trained or calibrated on.
    """

    rows: Mapping[str, list[Row]]
    watched: Mapping[str, list[Row]]
    evaluated_digest: str
    trained_digest: str


def files_of(plan: Plan) -> list[str]:
    """Every file and folder that a plan names."""
    rows = [file for task in plan.tasks for file in (*task.data, *task.test, *task.validation)]
    rows += [*plan.watch, *plan.replay, *plan.analyze.data, *plan.analyze.protected.values()]
    return [plan.model, *local_files(rows), *_beside(plan).values()]


def digests_beside(plan: Plan) -> dict[str, str]:
    """SHA-256 of files that are read beside models and rows: templates, and the run that is to be like."""
    found = {}
    for name, given in _beside(plan).items():
        path = Path(given) / "continual.json" if os.path.isdir(given) else Path(given)
        if os.path.isfile(path):
            found[name] = file_digest(path)
    return found


def _beside(plan: Plan) -> dict[str, str]:
    """By section and setting."""
    given = {
        "analyze.chat_template": plan.analyze.chat_template,
        "train.chat_template": plan.train.chat_template,
        "adapter.like": plan.adapter.like,
    }
    return {name: value for name, value in given.items() if value is not None}


def read_inputs(plan: Plan, split: Split) -> Inputs:
    """Reads all rows of a plan.

    Raises:
        SculptorError: if any cannot be used.
    """
    if plan.train.task == CLASSIFICATION or inspect_architecture(open_checkpoint(plan.model)).kind == "classifier":
        raise SettingsError(
            "a classifier's head has the classes of one task: give 'prompt' and 'completion' rows, or call `sculptor train` for "
            "each task"
        )
    rows = {
        task.name: read_evaluation_rows(
            plan.rows_of(task, split), task.labels, task.columns or plan.train.columns, all_renamed=False
        )
        for task in plan.tasks
    }
    watched = {
        name: read_evaluation_rows([text], None) for name, text in zip(_told_apart(plan.watch), plan.watch, strict=True)
    }
    evaluated = [row for part in (*rows.values(), *watched.values()) for row in part]
    return Inputs(rows, watched, digest_rows(evaluated), _trained_digest(plan))


def _trained_digest(plan: Plan) -> str:
    analysis = plan.analyze
    calibrated = [item for item in analysis.data if not is_self(item)]
    sources = read_sources(calibrated, analysis.max_rows, analysis.columns, mixed=True)
    if analysis.protected:
        sources += read_sources([*analysis.protected.values()], analysis.max_rows, analysis.columns, mixed=True)
    for task in plan.tasks:
        settings = plan.train_settings(task)
        sources += read_sources(task.data, settings.max_rows, settings.columns)
        replayed = [item for item in plan.replay if not is_self(item)]
        sources += read_sources(replayed, settings.max_rows, settings.columns, mixed=True, all_renamed=False)
    parts = [(source.weight, digest_rows(source.rows)) for source in sources]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _told_apart(texts: Sequence[str]) -> list[str]:
    """Names of files, with as much of what is above them as tells two of one name apart."""
    found = list(names_of(texts))
    parts = [Path(text).parts for text in texts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        found = [
            "/".join(place[-depth:]) if found.count(name) > 1 else name
            for name, place in zip(found, parts, strict=True)
        ]
    return found
