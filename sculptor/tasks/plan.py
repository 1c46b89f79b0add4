"""How a training is done here: in how many parts a step, and what several processes hold; and what each way takes."""

from dataclasses import replace
from math import prod

import torch

from sculptor.errors import SettingsError
from sculptor.planning.footprints import Footprint, Workload, footprints
from sculptor.planning.placement import available_memory, output_bytes, plan_archive, shortages
from sculptor.planning.splits import Split, choose_split, default_split
from sculptor.tasks.job import TrainJob, cast_to
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.optimizer import moments_of, optimizer_on_host
from sculptor.world import ALONE, World


def plans_of(job: TrainJob, device: torch.device, world: World = ALONE) -> dict[str, Footprint]:
    """What each way of training would take of one process, among these."""
    rows, _ = _sizes(job)
    return _plans_of(job, device, default_split(job.settings, rows, device), world)


def choose_parallel(job: TrainJob, device: torch.device, world: World) -> TrainJob:
    """The job with `parallel` decided: every process holds all where that fits, and on a CPU; else each its share.

    Raises:
        SettingsError: if what is asked for has no effect, or cannot be done in several processes.
    """
    settings = job.settings
    offload, parallel = settings.offload, settings.parallel
    if world.size == 1:
        if parallel != "auto":
            raise SettingsError(f"--parallel {parallel} without effect in one process; start several with torchrun")
        return job
    if parallel == "auto":
        if offload == "cpu":
            parallel = "shard"
        elif device.type == "cpu" or offload == "disk":
            parallel = "replicate"
        else:
            parallel = world.from_first("replicate" if _fits(job, device, world) else "shard")
    if offload == "disk" or (offload == "cpu" and parallel == "replicate"):
        other = "--offload cpu divides the model among them" if offload == "disk" else "use --parallel shard"
        raise SettingsError(f"--offload {offload} with {world.size} processes that hold all of the model: {other}")
    if parallel == "shard":
        _check_divided(settings)
    return replace(job, settings=replace(settings, parallel=parallel))


def _check_divided(settings: TrainSettings) -> None:
    faults = {
        "--optimizer bayes-adam": settings.optimizer == "bayes-adam",
        "--optimizer-mode fused": settings.optimizer_mode == "fused",
        "--keep-activations": settings.checkpoint_activations is False,
    }
    idle = [option for option, is_fault in faults.items() if is_fault]
    if idle:
        raise SettingsError(f"{', '.join(idle)}: not with --parallel shard; leave it out, or use --parallel replicate")


def _fits(job: TrainJob, device: torch.device, world: World) -> bool:
    """Whether every device has room for all of the model."""
    split = replace(job, settings=replace(job.settings, offload="none", parallel="replicate"))
    split = split_steps(split, device, world)
    plan = plans_of(split, device, world)["none"]
    return not shortages(plan, device.type, *available_memory(device), float("inf"))


def split_steps(job: TrainJob, device: torch.device, world: World = ALONE) -> TrainJob:
    """Decides how a process's part of a step is split, as far as the settings leave it open; the same for devices of one size."""
    rows, longest = _sizes(job)
    rows = -(-rows // world.size)
    divided = job.settings.parallel == "shard"  # its blocks are always computed again
    settings = replace(job.settings, checkpoint_activations=True) if divided else job.settings
    split = choose_split(lambda split: _plans_of(job, device, split, world), settings, rows, longest, device)
    split = world.from_first(split)
    again = split.recompute if device.type == "cuda" else job.settings.checkpoint_activations
    settings = replace(job.settings, micro_batch_size=split.rows, checkpoint_activations=again)
    return replace(job, settings=settings)


def _num_new(job: TrainJob) -> int:
    """New rows in numbers that are trained, the gradients of the wholes that they are part of counted in: a quarter at most."""
    growth = job.growth
    sizes = [prod(job.base.infos[name].shape) for name in growth.names] if growth else []
    return sum(size * len(growth.tokens) // growth.before + size // 4 for size in sizes) if growth else 0


def _sizes(job: TrainJob) -> tuple[int, int]:
    """Rows of a step, and tokens of the longest."""
    trained = job.trained
    longest = max((example.length for example in trained.examples), default=1)
    return min(job.settings.batch_size, max(1, trained.num_epoch)), longest


def _plans_of(job: TrainJob, device: torch.device, split: Split, world: World) -> dict[str, Footprint]:
    """All ways that are possible."""
    found = _ways(job, device, split, world)
    return {"none": found["none"]} if job.settings.parallel == "replicate" else found


def _ways(job: TrainJob, device: torch.device, split: Split, world: World) -> dict[str, Footprint]:
    settings = job.settings
    rows, longest = _sizes(job)
    assert settings.carry is not None
    steps = settings.total_steps(-(-job.trained.num_epoch // rows))
    work = Workload(
        tokens=rows * longest,
        micro_batches=1,
        fused=settings.optimizer_mode == "fused",
        keep_inputs=settings.offload_inputs is False,
        kept=len(moments_of(settings)),
        on_host=optimizer_on_host(settings, "cpu", device),
        num_extra=sum(prod(job.checkpoint.infos[name].shape) for name in set(job.extra.values())) + _num_new(job),
        written=output_bytes(job.checkpoint, job.archive, settings.carry, cast_to(settings))
        + 4.0 * job.archive.num_free * (settings.optimizer == "bayes-adam"),
        saves=-(-steps // settings.steps_between_saves(steps)),
        evaluates=job.evaluation is not None,
        row=longest,
        processes=world.size if settings.parallel == "shard" else 1,
    )
    matrices = plan_archive(job.archive, job.architecture)
    return footprints(job.checkpoint, job.architecture, matrices, device, split.workload(work, rows))
