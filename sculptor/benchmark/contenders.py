"""What a sequence is told where it is run by something else than the plan's own method: analysis, settings, rows, ending.

Plain fine-tuning with one measure against forgetting each, on the rows and steps of the others:

* replay: a share of every epoch are rows of all earlier tasks;
* l2: the update is pulled towards 0 in every step, W towards where the task began: A <- A - rate * decay * A;
* kl: weight * KL(base || new) on the rows' own tokens is added to the loss, the base being where the task began;
* eaft: each token's loss is weighted by the entropy of the prediction (`numerics/entropy.py`);
* interpolate: of what a task changed, a share stays: W <- W0 + keep (W - W0) (WiSE-FT, arXiv 2109.01903);
* lines: the same, more in deep blocks, all in the last (LiNeS, arXiv 2410.17146);
* rescaled: the same as interpolate, with the share that leaves an update of the norm that another run's had, at most all of it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sculptor.benchmark.finished import read_finished
from sculptor.benchmark.plan import RULES_OF, Contender, Plan, PlannedTask
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.data.mixture import Mixture
from sculptor.data.rows import check_weights, read_sources, unweighted, weight_of
from sculptor.edits.settings import Interpolate, Lines
from sculptor.errors import SettingsError
from sculptor.jobs.replay import check_replay
from sculptor.methods.settings import SELF, AnalyzeSettings, Basis, Carry
from sculptor.progress import Progress
from sculptor.tasks.edit import edit
from sculptor.training.settings import STREAMED, TrainSettings

# Settings of training that only archives with moments, and so only our own method, have a use for.
OF_MOMENTS = ("soften", "memory_rows", "memory_weight")
# What of [analyze] says how rows are measured, for methods that measure them as our own does.
_CALIBRATION = (
    "budget", "protect", "chat", "chat_template", "columns", "max_rows", "calibration_tokens", "max_length", "fisher", "dtype",
    "device_memory",
)  # fmt: skip
SHRUNK = ("interpolate", "lines", "rescaled")
_PIECE = 8192  # rows of a large tensor that are read at once


def analysis_of(plan: Plan, method: Contender) -> AnalyzeSettings:
    """How the base is analyzed."""
    settings = plan.analyze
    if method == "sculptor":
        return settings
    shared = {name: getattr(settings, name) for name in ("seed", "targets", "exclude", "device")}
    shared["samples"] = samples_of(plan)
    if method == "crispedit":
        given = {name: getattr(settings, name) for name in _CALIBRATION}
        data = settings.data or (SELF,)
        return AnalyzeSettings(rule="crispedit", basis="curvature", data=data, **given, **shared)
    if method in RULES_OF:
        rule, told = RULES_OF[method]
        return AnalyzeSettings(rule=rule, **{name: getattr(plan.adapter, name) for name in told}, **shared)
    if method == "slm":
        return AnalyzeSettings(rule="lowrank", rank=plan.adapter.rank, **shared)
    preserve = 0.0 if method != "random" else 0.5 if settings.preserve is None else settings.preserve
    basis: Basis = "random" if method == "random" else "weights"
    return AnalyzeSettings(basis=basis, constraint=settings.constraint, preserve=preserve, **shared)


def samples_of(plan: Plan) -> bool | None:
    """Whether archives of methods that would keep no samples need some: a limit is measured on them."""
    return True if plan.train.max_harm or plan.train.harm_every else None


def check_contender(plan: Plan, method: Contender) -> None:
    """Refuses, before the first task, what a method cannot do with a plan.

    Raises:
        SettingsError: saying why.
    """
    if method in ("joint", "replay", "esacl") and len({task.columns for task in plan.tasks}) > 1:
        raise SettingsError(f"--method {method}: tasks with different columns cannot be read together")
    if method in ("lora", "olora", "osf") and plan.replay:
        raise SettingsError(f"replay without effect with --method {method}: leave it out")
    check_replay(plan.replay)
    if method == "slm" and plan.train.offload in STREAMED:
        raise SettingsError(
            f"[train] offload = {plan.train.offload!r} with --method slm: rows have models of their own; use none"
        )
    if method == "l2" and plan.train.weight_decay:
        raise SettingsError("[train] weight_decay without effect with --method l2: [adapter] decay is what it takes")
    if method == "kl" and plan.train.kl_weight is not None:
        raise SettingsError("[train] kl_weight without effect with --method kl: [adapter] kl is what it takes")
    if method == "kl" and not plan.adapter.kl:
        raise SettingsError("--method kl with [adapter] kl 0 is plain fine-tuning: use --method full")
    if method == "eaft" and plan.train.token_weights != "same":
        raise SettingsError("[train] token_weights without effect with --method eaft, which is entropy; leave it out")
    idle = [
        name for name in ("optimizer", "evidence", "select_rows") if getattr(plan.train, name) not in (None, "adamw")
    ]
    if method in ("bayes-adam", "esacl") and idle:
        raise SettingsError(
            f"[train] {', '.join(idle)} without effect with --method {method}: [adapter] says it; leave it out"
        )
    if method == "esacl":
        weighted = next(
            (task.name for task in plan.tasks if any(weight_of(item) is not None for item in task.data)), None
        )
        if weighted is not None:
            raise SettingsError(
                f"--method esacl: a choice among rows changes the shares of data with weights (task {weighted}); leave these out"
            )
    if method == "rescaled":
        norms_of(plan)


def settings_of(plan: Plan, method: Contender, task: PlannedTask) -> TrainSettings:
    """How a task is trained, by anything but PEFT."""
    settings = plan.train_settings(task)
    if method == "sculptor":
        return settings
    if settings.max_harm is None:  # a limit is our own method's default, and none of theirs
        settings = replace(settings, max_harm=0.0)
    if method == "crispedit":
        merged: TrainSettings = replace(settings, soften=None, carry=None)
        return merged
    # Plain fine-tuning protects nothing, so there is nothing to carry; rules go on in their own way.
    plain: Carry | None = "accumulate" if method == "random" else None if method in RULES_OF else "retake"
    changes: dict[str, Any] = dict.fromkeys(OF_MOMENTS) | {"carry": plain}
    if method == "l2":
        changes["weight_decay"] = plan.adapter.decay
    if method == "kl":
        changes["kl_weight"] = plan.adapter.kl
    if method == "eaft":
        changes["token_weights"] = "entropy"
    if method == "orthsr" and plan.adapter.kl:
        changes["kl_weight"] = settings.kl_weight or plan.adapter.kl
    if method == "bayes-adam":
        changes |= {"optimizer": "bayes-adam", "evidence": plan.adapter.evidence, "carry": "keep"}
    if method == "slm":
        changes["carry"] = "keep"
    if method == "esacl":
        changes |= {"carry": None, "select_rows": plan.adapter.select if plan.adapter.select < 1 else None}
    if method == "replay":
        plain_settings, changes["max_steps"] = plainly(settings, task)
        changes["batch_size"] = plain_settings.batch_size
    changed: TrainSettings = replace(settings, **changes)
    return changed


def plainly(settings: TrainSettings, task: PlannedTask) -> tuple[TrainSettings, int]:
    """How plain fine-tuning passes over a task's rows, and how many optimizer steps that are."""
    sizes, weights = _sizes(settings, task), check_weights(task.data)
    rows = sum(sizes) if weights is None else Mixture(tuple(sizes), tuple(weights)).num_epoch
    return settings.for_rows(rows), settings.total_steps(rows)


def jointly(plan: Plan) -> Plan:
    """With passes and rows of a step as single tasks have them: of the rows of all, fewer and more would be chosen."""
    if plan.train.max_steps is not None:
        return plan
    found = [plainly(plan.train_settings(task), task)[0] for task in plan.tasks]
    epochs = plan.train.epochs or max(settings.epochs or 1.0 for settings in found)
    rows = plan.train.batch_size or min(settings.batch_size or 1 for settings in found)
    return replace(plan, train=replace(plan.train, epochs=epochs, batch_size=rows))


def joint_data(plan: Plan) -> tuple[str, ...]:
    """The data of all tasks as those of one: where some have weights all get some, and each task the share that its rows are."""
    files = tuple(item for task in plan.tasks for item in task.data)
    if all(weight_of(item) is None for item in files):
        return files
    parts = [
        pair
        for task in plan.tasks
        for pair in _weighted(plan.train_settings(task), task, float(sum(_sizes(plan.train_settings(task), task))))
    ]
    return tuple(f"{unweighted(item)}:{weight:g}" for item, weight in parts)


def _sizes(settings: TrainSettings, task: PlannedTask) -> list[int]:
    """Rows of each of a task's data."""
    sources = read_sources(task.data, settings.max_rows, settings.columns, all_renamed=False)
    return [len(source.rows) for source in sources]


def data_of(plan: Plan, method: Contender, task: PlannedTask) -> Sequence[str | tuple[str, float]]:
    """What a task is trained on: its own data, with those of earlier tasks for replay."""
    names = [one.name for one in plan.tasks]
    earlier = plan.tasks[: names.index(task.name)] if method == "replay" else ()
    if not earlier:
        return task.data
    share = plan.adapter.replay
    parts = [(task, 1 - share), *((one, share / len(earlier)) for one in earlier)]
    return [item for one, part in parts for item in _weighted(plan.train_settings(one), one, part)]


def _weighted(settings: TrainSettings, task: PlannedTask, part: float) -> list[tuple[str, float]]:
    """A task's data, with weights that add up to its part."""
    weights = check_weights(task.data) or _sizes(settings, task)
    return [(item, part * weight / sum(weights)) for item, weight in zip(task.data, weights, strict=True)]


def shrink(
    plan: Plan, method: Contender, stage: str, before: str | Path, after: Path, output: Path, progress: Progress
) -> None:
    """Writes the checkpoint that keeps a share of what a task changed.

    Args:
        plan: of the run.
        method: interpolate, lines or rescaled.
        stage: name of the task.
        before, after: checkpoints around the task.
        output: directory to write.
        progress: makes progress bars.
    """
    keep = plan.adapter.keep
    if method == "rescaled":
        found = update_norm(open_checkpoint(before), open_checkpoint(after))
        keep = min(1.0, norms_of(plan)[stage] / found) if found else 1.0
    share = Lines(alpha=keep) if method == "lines" else Interpolate(alpha=keep)
    edit(before, after, output, share, device=plan.train.device, overwrite=True, progress=progress)


def update_norm(before: Checkpoint, after: Checkpoint) -> float:
    """||W' - W|| over all tensors together, in float64."""
    total = 0.0
    for name, info in before.infos.items():
        if not info.dtype.is_floating_point:
            continue
        rows = info.shape[0] if info.shape else 1
        for start in range(0, rows, _PIECE):
            old, new = (each.rows(name, start, start + _PIECE).double() for each in (before, after))
            total += float((new - old).square().sum())
    return math.sqrt(total)


def norms_of(plan: Plan) -> dict[str, float]:
    """Norms of the updates of another run of the plan's tasks, by task.

    Raises:
        SettingsError: if the plan names none, or one of other tasks.
        DataError: if its report cannot be read.
    """
    like = plan.adapter.like
    if like is None:
        raise SettingsError(
            "--method rescaled: [adapter] like is missing; name the output of the run whose updates' norms are wanted, say "
            "--set adapter.like=run"
        )
    norms = {stage.name: stage.update for stage in read_finished(like).stages[1:] if stage.update is not None}
    missing = [task.name for task in plan.tasks if task.name not in norms]
    if missing:
        raise SettingsError(
            f"[adapter] like: {like} has no norm of an update for task {missing[0]}; name the output of a finished "
            "`sculptor continual`"
        )
    return {name: norm for name, norm in norms.items() if norm is not None}
