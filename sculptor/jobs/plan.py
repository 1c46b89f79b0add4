"""How a training is done here: what several processes hold, in how many parts a step is done, and where the model is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from sculptor.checkpoint.staging import partial_path
from sculptor.errors import SettingsError
from sculptor.jobs.job import TrainJob, cast_to
from sculptor.jobs.processes import on_this_machine
from sculptor.planning.footprints import Footprint, Workload, footprints
from sculptor.planning.placement import available_memory, choose, output_bytes, plan_archive, shortages
from sculptor.planning.splits import Split, choose_split, default_split
from sculptor.training.precision import compute_dtype, decide_precision
from sculptor.training.settings import Offload, Parallel, TrainSettings
from sculptor.training.stepping.optimizer import kept_bytes, optimizer_on_host
from sculptor.training.steps import Steps
from sculptor.world import World


@dataclass(frozen=True, eq=False, slots=True)
class _Split:
    """A job whose steps are split, and what each way of training it would take of one process."""

    job: TrainJob
    ways: Mapping[str, Footprint]


def plan_job(
    job: TrainJob, device: torch.device, output: Path, world: World, notice: Callable[[str], object] = lambda _: None
) -> TrainJob:
    """The job with all settings decided that depend on the machine; told in a line, unless everything is as asked.

    Raises:
        SettingsError: if what is asked for cannot be done here, or has no effect.
    """
    asked = job.settings
    with world.together():
        precision = decide_precision(asked.precision, job.checkpoint, device)
        job = replace(job, settings=replace(asked, precision=world.from_first(precision)))
    with world.together():
        split = _choose_parallel(job, device, world)
    divided = split.job.settings.parallel == "shard"
    with world.together():
        found = choose(
            dict(split.ways),
            device,
            asked.offload,
            output,
            partial_path(output),
            sharing=on_this_machine() if divided else 1,
        )
    plan, reason = world.from_first(found)
    settings, unused = _placed(split.job.settings, asked, plan.offload)
    if unused:
        reason += f"; without effect there: {', '.join(unused)}"
    is_news = not reason.endswith(("as asked", "everything fits")) or (divided and asked.parallel != "shard")
    if world.size > 1:
        reason += f"; --parallel {settings.parallel}"
    if is_news:
        notice(reason)
    return replace(job, settings=settings, placement=reason)


# What several processes hold


def _choose_parallel(job: TrainJob, device: torch.device, world: World) -> _Split:
    """With `parallel` decided: every process holds all where that fits, and on a CPU; else each its share."""
    offload, parallel = job.settings.offload, job.settings.parallel
    if world.size == 1:
        if parallel != "auto":
            raise SettingsError(f"--parallel {parallel} without effect in one process; start several with torchrun")
        return _split_steps(job, device, world)
    if parallel == "auto":
        if offload in ("auto", "none") and device.type != "cpu":
            return _replicated_or_divided(job, device, world)
        parallel = "shard" if offload in ("bases", "cpu") else "replicate"
    return _split_parallel(job, parallel, device, world)


def _replicated_or_divided(job: TrainJob, device: torch.device, world: World) -> _Split:
    """Every process holds all of the model, if every device has room for it."""
    whole = _split_parallel(job, "replicate", device, world)
    lacking = shortages(whole.ways["none"], device.type, *available_memory(device), float("inf"))
    return whole if world.from_first(not lacking) else _split_parallel(job, "shard", device, world)


def _split_parallel(job: TrainJob, parallel: Parallel, device: torch.device, world: World) -> _Split:
    settings = replace(job.settings, parallel=parallel)
    _check_parallel(settings, world)
    return _split_steps(replace(job, settings=settings), device, world)


def _check_parallel(settings: TrainSettings, world: World) -> None:
    """Refuses what cannot be done in several processes."""
    offload, divided = settings.offload, settings.parallel == "shard"
    if offload == "disk" or (offload in ("bases", "cpu") and not divided):
        other = "--offload cpu divides the model among them" if offload == "disk" else "use --parallel shard"
        raise SettingsError(f"--offload {offload} with {world.size} processes that hold all of the model: {other}")
    faults = {
        "--optimizer bayes-adam": settings.optimizer == "bayes-adam",
        "--optimizer-mode fused": settings.optimizer_mode == "fused",
        "--keep-activations": settings.checkpoint_activations is False,
    }
    idle = [option for option, is_fault in faults.items() if is_fault]
    if idle and divided:
        raise SettingsError(f"{', '.join(idle)}: not with --parallel shard; leave it out, or use --parallel replicate")


# In how many parts a step is done


def _split_steps(job: TrainJob, device: torch.device, world: World) -> _Split:
    """With a process's part of a step split, as far as the settings leave it open; the same for devices of one size."""
    steps, settings = _steps(job), job.settings
    rows = -(-steps.rows // world.size)
    # Blocks of a divided model are always computed again.
    wanted = replace(settings, checkpoint_activations=True) if settings.parallel == "shard" else settings
    split = world.from_first(
        choose_split(lambda split: _ways(job, device, split, world), wanted, rows, steps.longest, device)
    )
    again = split.recompute if device.type == "cuda" else settings.checkpoint_activations
    settings = replace(settings, micro_batch_size=split.rows, checkpoint_activations=again)
    job = replace(job, settings=settings)
    return _Split(job, _ways(job, device, default_split(settings, steps.rows, device), world))


def _steps(job: TrainJob) -> Steps:
    assert job.steps is not None
    return job.steps


def _ways(job: TrainJob, device: torch.device, split: Split, world: World) -> dict[str, Footprint]:
    """What all ways that are possible would take, by `--offload`."""
    settings, steps = job.settings, _steps(job)
    assert settings.carry is not None
    work = Workload(
        tokens=steps.rows * steps.longest,
        micro_batches=1,
        fused=settings.optimizer_mode == "fused",
        keep_inputs=settings.offload_inputs is False,
        kept=kept_bytes(settings),
        copied=4 * (settings.optimizer == "bayes-adam"),
        on_host=optimizer_on_host(settings, "cpu", device),
        num_extra=sum(prod(job.checkpoint.infos[name].shape) for name in set(job.extra.values())) + _num_new(job),
        written=output_bytes(job.checkpoint, job.archive, settings.carry, cast_to(settings))
        + 4.0 * job.archive.num_free * (settings.optimizer == "bayes-adam"),
        saves=-(-steps.total // settings.steps_between_saves(steps.total)),
        evaluates=job.evaluation is not None,
        row=steps.longest,
        processes=world.size if settings.parallel == "shard" else 1,
        compute=compute_dtype(settings.precision, device),
    )
    matrices = plan_archive(job.archive, job.architecture)
    found = footprints(job.checkpoint, job.architecture, matrices, device, split.workload(work, steps.rows))
    return {"none": found["none"]} if settings.parallel == "replicate" else found


def _num_new(job: TrainJob) -> int:
    """New rows in numbers that are trained, the gradients of the wholes that they are part of counted in: a quarter at most."""
    growth = job.growth
    sizes = [prod(job.base.infos[name].shape) for name in growth.names] if growth else []
    return sum(size * len(growth.tokens) // growth.before + size // 4 for size in sizes) if growth else 0


# Where the model is


def _placed(settings: TrainSettings, asked: TrainSettings, offload: Offload) -> tuple[TrainSettings, list[str]]:
    """The settings for where the model is, and the options that have no effect there."""
    resident = offload == "none" and settings.parallel != "shard"
    _check_resident(settings, resident)
    if not resident:
        settings = replace(settings, checkpoint_activations=asked.checkpoint_activations)
    waits = offload != "none"
    # By name: whether it matters there, the option, and the values that ask for what is done anyway, default first.
    concerns: dict[str, tuple[bool, str, tuple[Any, Any]]] = {
        "optimizer_on": (offload == "cpu", "--optimizer-on", ("auto", "device")),
        "optimizer_mode": (waits, "--optimizer-mode fused", ("exact", "exact")),
        "offload_inputs": (waits, "--offload-inputs", (None, False)),
        "checkpoint_activations": (resident, "--keep-activations", (None, True)),
    }
    idle = {name: (option, same) for name, (matters, option, same) in concerns.items() if not matters}
    unused = [option for name, (option, same) in idle.items() if getattr(settings, name) not in same]
    return replace(settings, offload=offload, **{name: same[0] for name, (_, same) in idle.items()}), unused


def _check_resident(settings: TrainSettings, resident: bool) -> None:
    """Refuses what needs all of the model on the device."""
    if settings.kl_weight is not None and not resident:
        raise SettingsError(
            "--kl-weight: the base's forward needs all of the model on one device; leave it out, or use --offload none and "
            "--parallel replicate (--max-harm goes with offloading)"
        )
