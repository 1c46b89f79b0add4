"""lm-eval's tasks (extra `harness`): those that it brings, and YAML files of one's own."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculptor.distribution import extra
from sculptor.errors import DataError, SettingsError
from sculptor.model.load import LoadedModel

_MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task, or a group of them.

    Attributes:
        name: as lm-eval calls it.
        metric: with its filter, if that is another than none.
        value: of the metric; `error` its standard error, None where there is none.
        num_rows: documents it is over; None for a group.
    """

    name: str
    metric: str
    value: float
    error: float | None
    num_rows: int | None


def require_harness() -> Any:
    """The library.

    Raises:
        SettingsError: if it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import lm_eval
    except ImportError:
        raise SettingsError(f"--tasks needs lm-eval: {extra('harness')}") from None
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def check_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    """What knows the tasks.

    Raises:
        SettingsError: if lm-eval is not installed, there is no such folder, or no such task.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise SettingsError(f"--include-path {include_path}: no such folder; expected one of task files (YAML)")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if not manager.match_tasks([name]):
            import difflib

            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise SettingsError(
                f"--tasks {name}: no such task among {len(manager.all_tasks):,}"
                + (f"; nearest are {', '.join(near)}" if near else "; --include-path names a folder of your own")
            )
    return manager


def run_tasks(
    loaded: LoadedModel,
    names: Sequence[str],
    manager: Any,
    *,
    max_length: int,
    batch_size: int,
    max_rows: int | None,
    num_fewshot: int | None,
    chat: bool,
) -> tuple[TaskResult, ...]:
    """Every metric of some tasks.

    Args:
        loaded: the model.
        names: tasks, groups or patterns.
        manager: of `check_tasks`.
        max_length: longest sequence in tokens.
        batch_size: requests per forward.
        max_rows: documents of each task, the first ones; default all.
        num_fewshot: examples before each; default the task's own number.
        chat: ask through the chat template.

    Raises:
        DataError: if a task cannot be run, for instance because its data set is not here.
    """
    lm_eval = require_harness()
    from lm_eval.models.huggingface import HFLM

    if chat and not loaded.tokenizer.chat_template:
        raise SettingsError("--chat needs a chat template, and the tokenizer has none; leave it out")
    chosen = [name for given in names for name in manager.match_tasks([given])]
    try:
        model = HFLM(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, max_length=max_length,
            backend="seq2seq" if loaded.kind == "seq2seq" else "causal", trust_remote_code=False,
        )  # fmt: skip
        model._device = loaded.device  # of a streamed model the parameters are elsewhere
        found = lm_eval.simple_evaluate(
            model=model, tasks=chosen, task_manager=manager, limit=max_rows, num_fewshot=num_fewshot,
            apply_chat_template=chat, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except Exception as cause:  # tasks are code and files of anybody
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise DataError(f"--tasks {', '.join(chosen)[:200]}: lm-eval cannot run them ({reason})") from cause
    return tuple(_flat(found))


def _flat(found: Any) -> list[TaskResult]:
    rows = []
    counts = found.get("n-samples") or {}
    for name, figures in (found.get("results") or {}).items():
        for key, value in figures.items():
            metric, _, kept = key.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or metric.endswith("_stderr") or not kept:
                continue
            error = figures.get(f"{metric}_stderr,{kept}")
            rows.append(
                TaskResult(
                    name,
                    metric if kept == "none" else f"{metric} ({kept})",
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                    (counts.get(name) or {}).get("effective"),
                )
            )
    return rows
