"""`sculptor.estimate`: what training a checkpoint would take, for each way of offloading, before anything starts."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Target, inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import encode, resolve_max_length
from sculptor.data.rows import read_rows
from sculptor.errors import SettingsError
from sculptor.model.load import load_tokenizer, resolve_device
from sculptor.numerics.bases import stored_columns
from sculptor.numerics.staircase import Constraint, Staircase
from sculptor.tasks.placement import Shortage, archive_shapes, available_disk, available_memory, existing, shortages
from sculptor.training.footprint import Footprint, MatrixShape, Side, Workload, footprints

_ASSUMED = {"tflops": 300.0, "link": 25.0, "disk": 2.0}
# Of a symmetric eigenvalue problem measured at this size, larger ones take the cube of the ratio at most.
_MEASURED_SIZE = {"cuda": 2048, "cpu": 512}


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateSettings:
    """What is to be trained, and on what."""

    preserve: float = 0.5
    """Without an archive: share of directions protected in every matrix."""
    constraint: Constraint = "double"
    """Without an archive: what an update may not touch."""
    batch_size: int = 32
    """Rows per optimizer step."""
    micro_batch_size: int = 8
    """Rows per forward."""
    max_length: int | None = None
    """Tokens per row; default 1024 or the model's limit."""
    fused: bool = False
    """Blocks are updated within the backward pass."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    gpu_memory: float | None = None
    """GB of a GPU to plan for, there or not."""
    host_memory: float | None = None
    """GB of host memory to plan for; default what is free."""
    tflops: float | None = None
    """TFLOP/s of matrix products; default measured."""
    link: float | None = None
    """GB/s between host and device, each way; default measured."""
    disk: float | None = None
    """GB/s of the disk; default measured."""

    def __post_init__(self) -> None:
        positive = (
            "batch_size",
            "micro_batch_size",
            "max_length",
            "gpu_memory",
            "host_memory",
            "tflops",
            "link",
            "disk",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise SettingsError(f"--{name.replace('_', '-')} {value}: expected more than 0")
        if self.fused and self.batch_size > self.micro_batch_size:
            raise SettingsError(
                f"--fused: a step of {self.batch_size} rows in micro-batches of {self.micro_batch_size} needs the gradients of "
                "all of them first; set --micro-batch-size to --batch-size"
            )
        if not 0 <= self.preserve < 1:
            raise SettingsError(f"--preserve {self.preserve}: expected 0 to below 1")


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of training.

    Attributes:
        plan: memory by component, bytes moved, operations.
        compute, link, disk: seconds per step that each needs at least.
        shortages: what there is too little of.
    """

    plan: Footprint
    compute: float
    link: float
    disk: float
    shortages: Sequence[Shortage]

    @property
    def step(self) -> float:
        """Seconds per step at least."""
        return max(self.compute, self.link, self.disk)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", self.compute), ("link", self.link), ("disk", self.disk), key=lambda item: item[1])[0]


@dataclass(frozen=True, slots=True)
class Estimate:
    """The result of `estimate`.

    Attributes:
        model: the checkpoint; `num_parameters` of it, `num_trainable` numbers that training changes.
        kind: cuda or cpu.
        tokens: per step, on average if there are data; `micro_batches` it is split into.
        lengths: tokens of the shortest and longest example, if there are data; then `num_examples` and `steps` per epoch.
        modes: by offload.
        speeds: TFLOP/s and GB/s; `measured` says which were measured here.
        device_memory, host_memory: bytes that are free.
        archive_bytes: size of the archive.
        analysis_seconds: of decomposing every matrix (basis weights), at most.
        chosen: the first mode that fits, or None.
    """

    model: str
    num_parameters: int
    num_trainable: int
    kind: str
    tokens: int
    micro_batches: int
    modes: Mapping[str, Mode]
    speeds: Mapping[str, float]
    measured: tuple[str, ...]
    device_memory: float
    host_memory: float
    archive_bytes: int
    analysis_seconds: float
    chosen: str | None
    lengths: tuple[int, int] | None = None
    num_examples: int | None = None
    steps: int | None = None


def estimate(
    model: str | Path,
    settings: EstimateSettings | None = None,
    *,
    subspaces: str | Path | None = None,
    data: Sequence[str | Path] = (),
    directory: str | Path = ".",
) -> Estimate:
    """Memory, time and size of training a checkpoint, from its headers (and the data, if given) alone.

    Args:
        model: a checkpoint directory or hub name.
        settings: the job and the machine.
        subspaces: its archive, if there is one.
        data: files of the task; memory is then planned for the longest example, time for the average one.
        directory: on the disk that files would go to.

    Raises:
        SculptorError: if the checkpoint, the archive or the data cannot be used.
    """
    settings = settings or EstimateSettings()
    assumed = EstimateSettings()
    if subspaces is not None and (settings.preserve, settings.constraint) != (assumed.preserve, assumed.constraint):
        raise SettingsError("--preserve and --constraint without effect with --subspaces: the archive says both")
    checkpoint = open_checkpoint(model)
    architecture = inspect_architecture(checkpoint)
    device = resolve_device(settings.device) if settings.gpu_memory is None else torch.device("cuda")
    here = device.type == "cpu" or torch.cuda.is_available()
    archive = None if subspaces is None else Archive(subspaces)
    if archive is not None:
        archive.check_names(checkpoint)
        shapes = archive_shapes(archive, architecture)
    else:
        shapes = [_assumed(target, settings) for target in architecture.targets]
    sides = {
        side.key: side.columns * d
        for shape in shapes
        for side, d in zip((shape.output, shape.input), shape.target.shape, strict=True)
        if side is not None
    }
    archive_bytes = 4 * sum(sides.values()) if archive is None else archive.num_bytes
    length = resolve_max_length(settings.max_length, architecture.max_positions)
    lengths: list[int] = []
    if data:
        tokenizer = load_tokenizer(checkpoint, architecture.kind)
        rows = read_rows(tuple(map(str, data)))
        lengths = [
            e.length for e in encode(rows, tokenizer, architecture.kind, length, architecture.vocab_size).examples
        ]
        length = max(lengths)
    batch = min(settings.batch_size, len(lengths) or settings.batch_size)
    micro = min(settings.micro_batch_size, batch)
    work = Workload(
        batch * length,
        -(-batch // micro),
        settings.fused,
        on_host=device.type == "cuda" and not settings.fused,
        recompute=device.type == "cuda",
        written=float(checkpoint.num_bytes + archive_bytes),
        saves=2,
        row=length,
        micro_rows=micro,
    )
    plans = footprints(checkpoint, architecture, shapes, device, work)
    if lengths:
        work = replace(work, tokens=round(batch * sum(lengths) / len(lengths)))
    works = footprints(checkpoint, architecture, shapes, device, work)
    speeds, measured = _speeds(settings, device, here, Path(directory))
    free_device, free_host = available_memory(device if here else torch.device("cpu"))
    free_device = 1e9 * settings.gpu_memory if settings.gpu_memory is not None else free_device
    free_host = 1e9 * settings.host_memory if settings.host_memory is not None else free_host
    if device.type == "cpu":
        free_device = free_host
    free_disk = available_disk(Path(directory))
    modes = {
        name: _mode(
            plan, works[name], speeds, device.type, shortages(plan, device.type, free_device, free_host, free_disk)
        )
        for name, plan in plans.items()
    }
    return Estimate(
        model=str(model),
        num_parameters=sum(info.num_bytes // info.dtype.itemsize for info in checkpoint.infos.values()),
        num_trainable=sum(shape.staircase.num_free for shape in shapes),
        kind=device.type,
        tokens=work.tokens,
        micro_batches=work.micro_batches,
        modes=modes,
        speeds=speeds,
        measured=measured,
        device_memory=free_device,
        host_memory=free_host,
        archive_bytes=archive_bytes,
        analysis_seconds=sum(_decomposition(shape, speeds["eigen"], device.type) for shape in shapes),
        chosen=next((name for name, mode in modes.items() if not mode.shortages), None),
        lengths=(min(lengths), max(lengths)) if lengths else None,
        num_examples=len(lengths) or None,
        steps=-(-len(lengths) // batch) or None,
    )


def _assumed(target: Target, settings: EstimateSettings) -> MatrixShape:
    m, n = target.shape
    k = round(settings.preserve * min(m, n))
    staircase = Staircase.of(settings.constraint, m, n, k, k)
    return MatrixShape(
        target,
        staircase,
        Side(stored_columns(m, k), f"{target.name} output") if staircase.outputs else None,
        Side(stored_columns(n, k), f"{target.name} input") if staircase.inputs else None,
    )


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


def _speeds(
    settings: EstimateSettings, device: torch.device, here: bool, directory: Path
) -> tuple[dict[str, float], tuple[str, ...]]:
    """What the machine does, measured in about a second each unless given."""
    measures: dict[str, Callable[[], float]] = {
        "tflops": lambda: _measure_products(device),
        "link": lambda: _measure_link(device),
        "disk": lambda: _measure_disk(directory),
    }
    speeds: dict[str, float] = {}
    measured = []
    for name, measure in measures.items():
        given = getattr(settings, name)
        speeds[name] = _ASSUMED[name] if given is None else given
        if given is None and (name == "disk" or (here and (name != "link" or device.type == "cuda"))):
            with suppress(OSError):  # a disk that is full or read-only is assumed to be like others
                speeds[name] = measure()
                measured.append(name)
    speeds["eigen"] = _measure_eigen(device if here else torch.device("cpu"))
    return speeds, tuple(measured)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a piece of work, the best of three."""
    times = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _measure_products(device: torch.device) -> float:
    d, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.ones(d, d, dtype=dtype, device=device)
    return 2 * d**3 / _timed(lambda: a @ a, device) / 1e12


def _measure_link(device: torch.device) -> float:
    from sculptor.streaming.transfers import free_host_memory, host_memory

    host = host_memory(2**28, pinned=True)
    memory = torch.empty(2**28, dtype=torch.uint8, device=device)
    seconds = _timed(lambda: memory.copy_(host, non_blocking=True), device)
    free_host_memory(host)
    return 2**28 / seconds / 1e9


def _measure_disk(directory: Path) -> float:
    """Writing, then reading past the cache, one after the other."""
    block = os.urandom(2**20) * 64
    with tempfile.TemporaryFile(dir=existing(directory)) as file:
        started = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        file.read()
        seconds = time.perf_counter() - started
    return 2 * len(block) / seconds / 1e9


def _measure_eigen(device: torch.device) -> float:
    """Seconds of an eigendecomposition in float64."""
    d = _MEASURED_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(d, d, dtype=torch.float64, generator=generator).to(device)
    gram = a @ a.T
    return _timed(lambda: torch.linalg.eigh(gram), device)


def _decomposition(shape: MatrixShape, seconds: float, kind: str) -> float:
    return seconds * (min(shape.target.shape) / _MEASURED_SIZE[kind]) ** 3
