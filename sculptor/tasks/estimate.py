"""`sculptor.estimate`: what training a checkpoint would take, for each way of offloading, before anything starts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Target, inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import resolve_max_length
from sculptor.data.rows import Data, as_items, names_of
from sculptor.errors import DataError, SettingsError
from sculptor.methods.kinds import Kinds, known_kinds, make_method
from sculptor.methods.method import Plans
from sculptor.model.load import check_trainable, resolve_device
from sculptor.planning.footprints import Footprint, Workload, added_up, footprints
from sculptor.planning.matrices import PlannedMatrix
from sculptor.planning.placement import Shortage, available_disk, available_memory, plan_archive, shortages
from sculptor.planning.settings import EstimateSettings
from sculptor.planning.speeds import decomposition_seconds, measure_speeds
from sculptor.planning.splits import Split, choose_split
from sculptor.progress import Progress, silent
from sculptor.tasks.data import preview_rows
from sculptor.tasks.estimate_report import Estimate, Mode
from sculptor.training.settings import OptimizerMode, TrainSettings

_GPUS_OF_A_MACHINE = 8  # which share its host memory


def estimate(
    model: str | Path,
    settings: EstimateSettings | None = None,
    *,
    subspaces: str | Path | None = None,
    data: Data = (),
    directory: str | Path = ".",
    rules: Kinds | None = None,
    progress: Progress = silent,
) -> Estimate:
    """Memory, time and size of training a checkpoint, from its headers (and the data, if given) alone.

    Args:
        model: a checkpoint directory or hub name.
        settings: the job and the machine.
        subspaces: its archive, if there is one.
        data: of the task, as `train` takes them; memory is then planned for the longest example, time for the average one.
        directory: on the disk that files would go to.
        rules: kinds of rules beside sculptor's own.
        progress: makes progress bars.

    Raises:
        SculptorError: if the checkpoint, the archive or the data cannot be used.
    """
    settings = settings or EstimateSettings()
    if subspaces is not None and settings.given:
        raise SettingsError(f"{', '.join(settings.given)} without effect with --subspaces: the archive says that")
    checkpoint = open_checkpoint(model)
    architecture = inspect_architecture(checkpoint)
    check_trainable(checkpoint, architecture)
    device = resolve_device(settings.device) if settings.gpu_memory is None else torch.device("cuda")
    here = device.type == "cpu" or torch.cuda.is_available()
    archive = None if subspaces is None else Archive(subspaces, rules=rules)
    if archive is not None:
        archive.check_names(checkpoint)
        matrices = plan_archive(archive, architecture)
    else:
        matrices = _planned(architecture.targets, settings, rules)
    archive_bytes = 4 * sum(map(_stored_numbers, matrices)) if archive is None else archive.num_bytes
    report, mixture, lengths = None, None, [resolve_max_length(settings.max_length, architecture.max_positions)]
    if as_items(data):
        report, lengths, mixture = preview_rows(
            checkpoint, architecture, data, max_length=settings.max_length, chat_template=settings.chat_template,
            columns=settings.columns, max_rows=settings.max_rows, rows=1, progress=progress,
        )  # fmt: skip
        if not lengths:
            raise DataError(f"{names_of(data)[0]}: no row fits into {report.max_length} tokens; raise --max-length")
    elif settings.columns is not None or settings.max_rows is not None:
        raise SettingsError("--columns and --max-rows without effect: there is no --data")
    length = max(lengths)
    batch = settings.batch_size if report is None else min(settings.batch_size, report.num_epoch)
    share = -(-batch // settings.gpus)  # rows of each process
    work = Workload(
        share * length,
        1,
        settings.fused,
        on_host=device.type == "cuda" and not settings.fused,
        written=float(checkpoint.num_bytes + archive_bytes),
        saves=2,
        row=length,
    )
    num_trainable = sum(matrix.num_free for matrix in matrices)
    free_device, free_host = available_memory(device if here else torch.device("cpu"))
    free_device = 1e9 * settings.gpu_memory if settings.gpu_memory is not None else free_device
    free_host = 1e9 * settings.host_memory if settings.host_memory is not None else free_host
    if device.type == "cpu":
        free_device = free_host

    free_disk = available_disk(Path(directory))

    def plans_for(work: Workload) -> dict[str, Footprint]:
        take = functools.partial(footprints, checkpoint, architecture, matrices, device)
        return _ways(settings, take, work, num_trainable)

    def lacking(plan: Footprint) -> list[Shortage]:
        sharing = min(settings.gpus, _GPUS_OF_A_MACHINE) if plan.shares else 1
        return shortages(plan, device.type, free_device, free_host / sharing, free_disk)

    def split_of(wanted: TrainSettings) -> Split:
        """That of the first way that fits."""
        names = list(plans_for(work)) if settings.gpus > 1 else []
        for name in names:

            def ways(split: Split, name: str = name) -> dict[str, Footprint]:
                return {"none": plans_for(split.workload(work, share))[name]}

            again = replace(wanted, checkpoint_activations=None if name == "replicate" else True)
            split = choose_split(ways, again, share, length, device, free_device)
            if name == names[-1] or not lacking(ways(split)["none"]):
                return split
        return choose_split(
            lambda split: plans_for(split.workload(work, share)), wanted, share, length, device, free_device
        )

    mode: OptimizerMode = "fused" if settings.fused else "exact"
    wanted = TrainSettings(
        batch_size=share, micro_batch_size=settings.micro_batch_size, optimizer_mode=mode, clip_by="matrix"
    )
    average = sum(lengths) / len(lengths) if mixture is None else mixture.mean(lengths)
    split = split_of(wanted)
    plans = plans_for(split.workload(work, share))
    work = split.workload(replace(work, tokens=round(share * average)), share)
    works = plans_for(work)
    given = {name: getattr(settings, name) for name in ("tflops", "link", "disk")}
    speeds, measured = measure_speeds(given, device, here, Path(directory))
    modes = {name: _mode(plan, works[name], speeds, device.type, lacking(plan)) for name, plan in plans.items()}
    return Estimate(
        model=str(model),
        num_parameters=sum(info.num_bytes // info.dtype.itemsize for info in checkpoint.infos.values()),
        num_trainable=num_trainable,
        kind=device.type,
        tokens=round(batch * average),
        gpus=settings.gpus,
        micro_batches=work.micro_batches,
        modes=modes,
        speeds=speeds,
        measured=measured,
        device_memory=free_device,
        host_memory=free_host,
        archive_bytes=archive_bytes,
        analysis_seconds=sum(
            decomposition_seconds(matrix.target.shape, speeds["eigen"], device.type)
            for matrix in matrices
            if matrix.rule.orthonormal & matrix.rule.stored().keys()
        ),
        chosen=next((name for name, mode in modes.items() if not mode.shortages), None),
        data=report,
        steps=None if report is None else -(-report.num_epoch // batch),
    )


def _ways(
    settings: EstimateSettings,
    plan: Callable[[Workload], dict[str, Footprint]],
    work: Workload,
    num_trained: int,
) -> dict[str, Footprint]:
    """By name: of one process by `--offload`, of several by `--parallel`, and by `--offload` where the model is divided."""
    if settings.gpus == 1:
        return plan(work)
    found: dict[str, Footprint] = {}
    if settings.parallel != "shard":
        alone = plan(work)["none"]
        found["replicate"] = replace(alone, exchanged=added_up(num_trained, settings.gpus))
    if settings.parallel != "replicate":
        divided = plan(replace(work, processes=settings.gpus))
        found |= {"shard": divided["none"], "shard, cpu": divided["cpu"]}
    return found


def _planned(targets: Sequence[Target], settings: EstimateSettings, rules: Kinds | None) -> list[PlannedMatrix]:
    """What an analysis would give every matrix.

    Raises:
        SettingsError: if the rule does not follow from shapes, or something does not go with it.
    """
    method = make_method(settings.analysis, known_kinds(rules), [target.shape for target in targets])
    if not isinstance(method, Plans):
        raise SettingsError(f"rule {settings.rule} does not follow from shapes: pass --subspaces")
    planned = [(target, method.plan(target.shape)) for target in targets]
    return [
        PlannedMatrix(target, rule, {name: f"{target.name}.{name}" for name in rule.stored()})
        for target, rule in planned
    ]


def _stored_numbers(matrix: PlannedMatrix) -> int:
    return sum(prod(size or 0 for size in shape) for shape in matrix.rule.stored().values())


def _mode(
    plan: Footprint, work: Footprint, speeds: Mapping[str, float], kind: str, lacking: Sequence[Shortage]
) -> Mode:
    return Mode(
        plan,
        compute=(work.operations + work.folding) / (1e12 * speeds["tflops"]),
        link=max(work.loaded, work.stored) / (1e9 * speeds["link"]) if kind == "cuda" else 0.0,
        disk=(work.read + work.written) / (1e9 * speeds["disk"]),
        shortages=lacking,
    )
