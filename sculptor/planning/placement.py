"""Where a model goes: what memory there is, and which way of holding the model fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import SettingsError
from sculptor.methods.method import Grows
from sculptor.methods.settings import Carry
from sculptor.numerics.transfer import free_bytes
from sculptor.planning.footprints import Footprint
from sculptor.planning.matrices import PlannedMatrix
from sculptor.training.settings import Offload

# Of the memory that is free, what a plan may take.
SHARE = 0.9
# Where the host has no room for all, what does not change may wait there.
_TIERS = ("none", "cpu", "bases", "disk")


def available_memory(device: torch.device) -> tuple[float, float]:
    """Free bytes on the device, and of the host (the same memory if the device is a CPU)."""
    import psutil

    host = float(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            room = (
                float(Path(limit).read_text())
                - float(Path(used).read_text())
                + _cached(Path(used).with_name("memory.stat"))
            )
        except (OSError, ValueError):  # no such group, or "max"
            continue
        host = min(host, room)
    if device.type == "cuda":
        return free_bytes(device), host
    return host, host


def _cached(stat: Path) -> float:
    """Bytes of files that a group counts as used and gives back when asked."""
    lines = (line.split() for line in stat.read_text().splitlines())
    return float(sum(int(value) for name, value in lines if name in ("active_file", "inactive_file")))


def plan_archive(archive: Archive, architecture: Architecture) -> list[PlannedMatrix]:
    """What an archive leaves free of every matrix."""
    targets = {target.name: target for target in architecture.targets}
    return [PlannedMatrix(targets[name], record.rule, record.tensors) for name, record in archive.items()]


def output_bytes(checkpoint: Checkpoint, archive: Archive, carry: Carry, cast_to: torch.dtype | None) -> float:
    """The most that a merged checkpoint and the archive after it take on disk."""
    kept = checkpoint.num_bytes
    if cast_to is not None:
        kept = sum(info.num_bytes // info.dtype.itemsize for info in checkpoint.infos.values()) * cast_to.itemsize
    stored, method = archive.manifest.tensors, archive.method
    growth = 0
    if isinstance(method, Grows):
        for record in archive.values():
            sizes = {name: getattr(torch, stored[tensor].dtype).itemsize for name, tensor in record.tensors.items()}
            growth += method.growth(carry, record.rule, sizes)
    return float(kept + archive.num_bytes + growth)


@dataclass(frozen=True, slots=True)
class Shortage:
    """What a way of training may need more of than there is.

    Attributes:
        what: kind of memory, or disk.
        needed: bytes that it needs; `of_rows` the part of these that fewer tokens lower.
        free: bytes that there are.
    """

    what: str
    needed: float
    free: float
    of_rows: float = 0.0

    @property
    def exists(self) -> bool:
        """Whether it is one."""
        return self.needed > self._usable

    @property
    def yields(self) -> bool:
        """Whether fewer tokens at a time can make an end to it."""
        return self.needed - self.of_rows < self._usable

    @property
    def _usable(self) -> float:
        """Files take what they take, while allocators lose some memory and plans of it are estimates."""
        return (1.0 if self.what == "disk" else SHARE) * self.free

    def __str__(self) -> str:
        return f"{_gb(self.needed)} of {self.what} ({_gb(self.free)} free)"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def remedy(lacking: Mapping[str, Sequence[Shortage]]) -> str:
    """What to do if no way of training fits."""
    enough = any(all(short.yields for short in found if short.what != "disk") for found in lacking.values())
    memory = "lower --micro-batch-size or --max-length" if enough else "free memory or use a larger machine"
    disk = "free some space or choose another place"
    each = [{short.what == "disk" for short in found} for found in lacking.values()]
    needed = [advice for advice, of_disk in ((memory, False), (disk, True)) if all(of_disk in kinds for kinds in each)]
    return " and ".join(needed or [f"{memory}, or {disk}"])


def existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    return next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.exists())


def available_disk(path: Path) -> float:
    """Free bytes where a file would go; infinite if the place does not say, since writing there will."""
    import shutil

    usage = shutil.disk_usage(existing(path))
    return float(usage.free) if usage.total else float("inf")


def shortages(plan: Footprint, kind: str, free_device: float, free_host: float, free_disk: float) -> list[Shortage]:
    """What a way of training needs more of than there is."""
    on_device, on_host = sum(plan.device.values()), sum(plan.host.values())
    rows, waiting_rows = plan.device.get("activations", 0.0), plan.host.get("activation checkpoints", 0.0)
    needs = [Shortage("memory", on_device + on_host, free_host, rows + waiting_rows)]
    if kind == "cuda":
        needs = [
            Shortage("GPU memory", on_device, free_device, rows),
            Shortage("host memory", on_host, free_host, waiting_rows),
        ]
    needs.append(Shortage("disk", sum(plan.disk.values()), free_disk))
    return [need for need in needs if need.exists]


def choose(
    found: dict[str, Footprint],
    device: torch.device,
    asked: Offload,
    disk: Path,
    replaced: Path | None = None,
    sharing: int = 1,
) -> tuple[Footprint, str]:
    """The first way that fits, or the one that was asked for; and why, in a line.

    Args:
        found: by offload.
        device: where to compute.
        asked: `auto` to choose.
        disk: a path on the disk that files would go to.
        replaced: what a killed run left there, which goes first.
        sharing: how many processes have the host's memory between them.

    Raises:
        SettingsError: if the host's memory, or the disk, does not suffice for what was asked or for any.
    """
    free_device, free_host = available_memory(device)
    free_host /= sharing
    free_disk = available_disk(disk)
    if replaced is not None:  # blocks, since files may have holes
        free_disk += sum(file.stat().st_blocks * 512 for file in replaced.rglob("*") if file.is_file())
    reasons: list[str] = []
    lacking: dict[str, list[Shortage]] = {}
    for name in [tier for tier in _TIERS if tier in found] if asked == "auto" else (asked,):
        plan = found[name]
        short = shortages(plan, device.type, free_device, free_host, free_disk)
        doubts: list[Shortage] = []
        if asked == "none":  # what activations take is an estimate, which does not forbid what a user knows better
            doubts = [of for of in short if of.what != "disk"]
            short = [of for of in short if of.what == "disk"]
        if not short:
            if asked != "auto":
                though = f", though it may need {' and '.join(map(str, doubts))}" if doubts else ""
                return plan, f"--offload {name}, as asked{though}"
            because = f": {'; '.join(reasons)}" if reasons else ": everything fits"
            return plan, f"--offload auto picks {name}{because}"
        lacking[name] = short
        reasons.append(f"{name} needs {' and '.join(map(str, short))}")
    raise SettingsError(f"--offload {asked}: does not fit: {'; '.join(reasons)}; {remedy(lacking)}")


def check_waiting(plan: Footprint, directory: Path) -> None:
    """Checks that there is room for what waits off the device.

    Raises:
        SettingsError: if host memory or disk does not suffice.
    """
    _, free_host = available_memory(torch.device("cpu"))
    short = shortages(plan, "cuda", float("inf"), free_host, available_disk(directory))
    if short:
        advice = 'use offload="disk"' if plan.offload == "cpu" else remedy({plan.offload: short})
        if short[0].what == "disk":
            advice = f"free some space in {directory}"
        raise SettingsError(f"--offload {plan.offload} needs {short[0]}; {advice}")
