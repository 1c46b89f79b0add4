"""What an estimate says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sculptor.jobs.data_report import DataReport
from sculptor.planning.expected import Expected
from sculptor.planning.footprints import Footprint
from sculptor.planning.placement import Shortage


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
        gpus: processes that share a step; `modes` is what each of them takes at most, `exchanged` bytes included.
        tokens: per step of all, on average if there are data; `micro_batches` it is split into.
        data: what the rows become, if there are some; then `steps` of an epoch, and `total` of a run unless `--epochs` is said.
        modes: by offload; of several processes by what each holds.
        speeds: TFLOP/s and GB/s; `measured` says which were measured here.
        device_memory, host_memory: bytes that are free.
        archive_bytes: size of the archive.
        basis: of the archive; `analysis_seconds` of decomposing every matrix for it, at most.
        chosen: the first mode that fits, or None.
        expected: on a CPU with data, how long all of `train` takes.
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
    basis: str
    analysis_seconds: float
    chosen: str | None
    gpus: int = 1
    data: DataReport | None = None
    steps: int | None = None
    total: int | None = None
    expected: Expected | None = None
