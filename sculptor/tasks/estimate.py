"""`sculptor.estimate`: what training a checkpoint would take, for each way of offloading, before anything starts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.data.examples import resolve_max_length
from sculptor.data.rows import Data, as_items, names_of
from sculptor.errors import DataError, SettingsError
from sculptor.jobs.data_report import DataReport
from sculptor.jobs.defaults import tokens_for
from sculptor.jobs.estimate_report import Estimate, Mode
from sculptor.methods.kinds import Kinds
from sculptor.methods.staircase import StaircaseRule
from sculptor.model.load import check_trainable, resolve_device
from sculptor.planning.expected import Expected, decomposing_seconds, expect
from sculptor.planning.footprints import Footprint, Workload, footprints
from sculptor.planning.matrices import PlannedMatrix, planned_matrices
from sculptor.planning.placement import Shortage, available_disk, available_memory, plan_archive, shortages
from sculptor.planning.settings import EstimateSettings
from sculptor.planning.speeds import measure_speeds
from sculptor.planning.splits import Split, choose_split
from sculptor.planning.traffic import added_up
from sculptor.progress import Progress, silent
from sculptor.tasks.data import preview_rows
from sculptor.training.precision import compute_dtype, decide_precision
from sculptor.training.settings import MOST_ROWS, OptimizerMode, TrainSettings
from sculptor.training.stepping.optimizer import kept_bytes

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

    Returns:
        Bytes, operations and seconds of every way of training, and which of them fit.

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
    archive = None if subspaces is None else Archive(subspaces, rules=rules)
    if archive is not None:
        archive.check_names(checkpoint)
        matrices = plan_archive(archive, architecture)
    else:
        matrices = planned_matrices(architecture.targets, settings.analysis, rules)
    archive_bytes = 4 * sum(_stored(matrices).values()) if archive is None else archive.num_bytes
    rows = _read_rows(checkpoint, architecture, data, settings, progress)
    machine = _Machine.of(settings, device, Path(directory))
    batch = rows.of_a_step(settings)
    ways = _Ways(
        settings,
        machine,
        functools.partial(footprints, checkpoint, architecture, matrices, device),
        sum(matrix.num_free for matrix in matrices),
        -(-batch // settings.gpus),
    )
    compute = compute_dtype(decide_precision("auto", checkpoint, device), device)
    work = Workload(
        ways.share * rows.longest,
        1,
        settings.fused,
        on_host=device.type == "cuda" and not settings.fused,
        written=float(checkpoint.num_bytes + archive_bytes),
        saves=2,
        row=rows.longest,
        kept=kept_bytes(TrainSettings(optimizer_dtype=settings.optimizer_dtype)),
        compute=compute,
    )
    split = ways.split(work)
    plans = ways.plans(split.workload(work, ways.share))
    work = split.workload(replace(work, tokens=round(ways.share * rows.average)), ways.share)
    works = ways.plans(work)
    given = {name: getattr(settings, name) for name in ("tflops", "link", "disk")}
    speeds, measured = measure_speeds(given, device, machine.here, Path(directory), compute)
    total = None if rows.report is None else rows.usual(settings).total_steps(rows.report.num_epoch)
    modes = {name: _mode(plan, works[name], speeds, device.type, ways.lacking(plan)) for name, plan in plans.items()}
    return Estimate(
        model=str(model),
        num_parameters=sum(info.num_bytes // info.dtype.itemsize for info in checkpoint.infos.values()),
        num_trainable=ways.num_trainable,
        kind=device.type,
        tokens=round(batch * rows.average),
        gpus=settings.gpus,
        micro_batches=work.micro_batches,
        modes=modes,
        speeds=speeds,
        measured=measured,
        device_memory=machine.device_bytes,
        host_memory=machine.host_bytes,
        archive_bytes=archive_bytes,
        basis=(settings.analysis if archive is None else archive.manifest.settings).resolved_basis,
        analysis_seconds=decomposing_seconds(matrices, speeds["eigen"], device.type),
        chosen=next((name for name, mode in modes.items() if not mode.shortages), None),
        data=rows.report,
        steps=None if rows.report is None else -(-rows.report.num_epoch // batch),
        total=total,
        expected=_expected(checkpoint, architecture, archive, matrices, rows, work, total, speeds)
        if device.type == "cpu" and settings.gpus == 1
        else None,
    )


def _expected(
    checkpoint: Checkpoint,
    architecture: Architecture,
    archive: Archive | None,
    matrices: Sequence[PlannedMatrix],
    rows: "_Rows",
    work: Workload,
    total: int | None,
    speeds: Mapping[str, float],
) -> Expected | None:
    """Of what `train` does with the data and nothing else said; it analyzes where there is no archive."""
    if rows.report is None or total is None:
        return None
    measured = any(isinstance(matrix.rule, StaircaseRule) and matrix.rule.moments for matrix in matrices)
    tokens = tokens_for(checkpoint, torch.device("cpu"))
    remembered = min(max(tokens, round(48 * rows.average)), rows.report.num_tokens) if measured else 0
    analyzed = tokens if archive is None and measured else 0
    return expect(checkpoint, architecture, matrices, work, total, speeds, analyzed=analyzed, remembered=remembered)


@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """How long rows are: those of the data, or as long as they may be.

    Attributes:
        report: of the data, if they were given.
        longest: tokens of the longest row, `average` of one as an epoch has them.
    """

    report: DataReport | None
    longest: int
    average: float

    def of_a_step(self, settings: EstimateSettings) -> int:
        """How many, all processes together."""
        if self.report is None:
            return settings.batch_size or MOST_ROWS
        return self.usual(settings).rows_of_step(self.report.num_epoch)

    def usual(self, settings: EstimateSettings) -> TrainSettings:
        """A training of which nothing else is said."""
        return TrainSettings(batch_size=settings.batch_size)


def _read_rows(
    checkpoint: Checkpoint, architecture: Architecture, data: Data, settings: EstimateSettings, progress: Progress
) -> _Rows:
    if not as_items(data):
        if settings.columns is not None or settings.max_rows is not None:
            raise SettingsError("--columns and --max-rows without effect: there is no --data")
        length = resolve_max_length(settings.max_length, architecture.max_positions)
        return _Rows(None, length, float(length))
    report, lengths, mixture = preview_rows(
        checkpoint, architecture, data, max_length=settings.max_length, chat_template=settings.chat_template,
        columns=settings.columns, max_rows=settings.max_rows, rows=1, progress=progress,
    )  # fmt: skip
    if not lengths:
        raise DataError(f"{names_of(data)[0]}: no row fits into {report.max_length} tokens; raise --max-length")
    return _Rows(report, max(lengths), sum(lengths) / len(lengths) if mixture is None else mixture.mean(lengths))


@dataclass(frozen=True, slots=True)
class _Machine:
    """What a machine has: `here` says whether its device is this one's, and the bytes are free ones."""

    device: torch.device
    here: bool
    device_bytes: float
    host_bytes: float
    disk_bytes: float

    @classmethod
    def of(cls, settings: EstimateSettings, device: torch.device, directory: Path) -> "_Machine":
        """As the settings say, and this one where they say nothing."""
        here = device.type == "cpu" or torch.cuda.is_available()
        on_device, on_host = available_memory(device if here else torch.device("cpu"))
        on_device = 1e9 * settings.gpu_memory if settings.gpu_memory is not None else on_device
        on_host = 1e9 * settings.host_memory if settings.host_memory is not None else on_host
        return cls(device, here, on_host if device.type == "cpu" else on_device, on_host, available_disk(directory))


@dataclass(frozen=True, eq=False, slots=True)
class _Ways:
    """The ways of training, by name: of one process by `--offload`, of several by `--parallel`, and `--offload` where these divide.

    Attributes:
        settings: the job and the machine.
        machine: what that has.
        take: what a step of one or several processes takes, by where the model waits.
        num_trainable: how many numbers are trained.
        share: rows of each process.
    """

    settings: EstimateSettings
    machine: _Machine
    take: Callable[[Workload], dict[str, Footprint]]
    num_trainable: int
    share: int

    def plans(self, work: Workload) -> dict[str, Footprint]:
        """What each takes for a step."""
        settings = self.settings
        if settings.gpus == 1:
            return self.take(work)
        found: dict[str, Footprint] = {}
        if settings.parallel != "shard":
            alone = self.take(work)["none"]
            found["replicate"] = replace(alone, exchanged=added_up(self.num_trainable, settings.gpus))
        if settings.parallel != "replicate":
            divided = self.take(replace(work, processes=settings.gpus))
            found |= {"shard": divided["none"], "shard, cpu": divided["cpu"], "shard, bases": divided["bases"]}
        return found

    def lacking(self, plan: Footprint) -> list[Shortage]:
        """What the machine has not."""
        has = self.machine
        sharing = min(self.settings.gpus, _GPUS_OF_A_MACHINE) if plan.shares else 1
        return shortages(plan, has.device.type, has.device_bytes, has.host_bytes / sharing, has.disk_bytes)

    def split(self, work: Workload) -> Split:
        """How a step is split: by one process as that does, by several as the first way that fits."""
        settings = self.settings
        mode: OptimizerMode = "fused" if settings.fused else "exact"
        wanted = TrainSettings(
            batch_size=self.share, micro_batch_size=settings.micro_batch_size, optimizer_mode=mode, clip_by="matrix"
        )
        names = list(self.plans(work)) if settings.gpus > 1 else []
        for name in names:
            split, fits = self._split_of(name, work, wanted)
            if name == names[-1] or fits:
                return split
        return self._choose(lambda split: self.plans(split.workload(work, self.share)), work, wanted)

    def _split_of(self, name: str, work: Workload, wanted: TrainSettings) -> tuple[Split, bool]:
        """That of one way of several processes, and whether it fits."""

        def plans(split: Split) -> dict[str, Footprint]:
            return {"none": self.plans(split.workload(work, self.share))[name]}

        again = replace(wanted, checkpoint_activations=None if name == "replicate" else True)
        split = self._choose(plans, work, again)
        return split, not self.lacking(plans(split)["none"])

    def _choose(self, plans: Callable[[Split], dict[str, Footprint]], work: Workload, wanted: TrainSettings) -> Split:
        return choose_split(plans, wanted, self.share, work.row, self.machine.device, self.machine.device_bytes)


def _stored(matrices: Sequence[PlannedMatrix]) -> dict[str, int]:
    """Numbers of each tensor of an archive."""
    return {
        matrix.names[name]: prod(size or 0 for size in shape)
        for matrix in matrices
        for name, shape in matrix.rule.stored().items()
    }


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
