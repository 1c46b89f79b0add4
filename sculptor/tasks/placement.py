"""Where a model goes: what memory there is, and which way of holding the model fits."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sculptor.archive.manifest import SideRecord
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import SettingsError
from sculptor.model.load import LoadedModel, load_model, load_streamed
from sculptor.progress import Progress, silent
from sculptor.streaming.weights import Tier
from sculptor.training.footprint import Footprint, MatrixShape, Side, Workload, footprints
from sculptor.training.settings import Offload

# Of the memory that is free, what a plan may take: allocators lose some, and estimates are estimates.
SHARE = 0.9
_TIERS = ("none", "cpu", "disk")


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
        return float(torch.cuda.mem_get_info(device)[0]), host
    return host, host


def _cached(stat: Path) -> float:
    """Bytes of files that a group counts as used and gives back when asked."""
    lines = (line.split() for line in stat.read_text().splitlines())
    return float(sum(int(value) for name, value in lines if name in ("active_file", "inactive_file")))


def archive_shapes(archive: Archive, architecture: Architecture) -> list[MatrixShape]:
    """What an archive leaves free of every matrix."""

    def side(record: SideRecord | None) -> Side | None:
        return None if record is None else Side(archive.manifest.tensors[record.tensor].shape[1], record.tensor)

    targets = {target.name: target for target in architecture.targets}
    return [
        MatrixShape(targets[name], record.staircase, side(record.output), side(record.input))
        for name, record in archive.items()
    ]


def output_bytes(checkpoint: Checkpoint, num_archive_bytes: int, cast_to: torch.dtype | None = None) -> float:
    """What a merged checkpoint and its archive take on disk."""
    if cast_to is None:
        return float(checkpoint.num_bytes + num_archive_bytes)
    numbers = sum(info.num_bytes // info.dtype.itemsize for info in checkpoint.infos.values())
    return float(cast_to.itemsize * numbers + num_archive_bytes)


def choose(found: dict[str, Footprint], device: torch.device, asked: Offload, disk: Path) -> tuple[Footprint, str]:
    """The first way that fits, or the one that was asked for; and why, in a line.

    Args:
        found: by offload.
        device: where to compute.
        asked: `auto` to choose.
        disk: the output, beside which files would go.

    Raises:
        SettingsError: if the host's memory, or the disk, does not suffice for what was asked or for any.
    """
    free_device, free_host = available_memory(device)
    left = disk.with_name(disk.name + ".partial").rglob("*")  # of a killed run, which is replaced
    free_disk = available_disk(disk) + sum(f.stat().st_size for f in left if f.is_file())
    reasons: list[str] = []
    scarce: set[str] = set()
    for name in _TIERS if asked == "auto" else (asked,):
        plan = found[name]
        short = shortages(plan, device.type, free_device, free_host, free_disk)
        if not short or (asked == name == "none"):  # an estimate does not forbid what a user knows better
            if asked != "auto":
                return plan, f"--offload {name}, as asked"
            because = f": {'; '.join(reasons)}" if reasons else ": everything fits"
            return plan, f"--offload auto picks {name}{because}"
        what, needed, free = short[0]
        scarce.add(what)
        reasons.append(f"{name} needs {_gb(needed)} of {what}, {_gb(free)} are free")
    remedy = (
        "free some space or choose another place" if scarce == {"disk"} else "lower --micro-batch-size or --max-length"
    )
    raise SettingsError(f"--offload {asked}: does not fit: {'; '.join(reasons)}; {remedy}")


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def available_disk(path: Path) -> float:
    """Free bytes where a file would go; infinite if the place does not say, since writing there will."""
    import shutil

    usage = shutil.disk_usage(_existing(path))
    return float(usage.free) if usage.total else float("inf")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def shortages(
    plan: Footprint, kind: str, free_device: float, free_host: float, free_disk: float
) -> list[tuple[str, float, float]]:
    """What a way of training needs more of than there is: its name, bytes needed, bytes free."""
    on_device, on_host = sum(plan.device.values()), sum(plan.host.values())
    needs = [("memory", on_device + on_host, free_host)]
    if kind == "cuda":
        needs = [("GPU memory", on_device, free_device), ("host memory", on_host, free_host)]
    needs.append(("disk", sum(plan.disk.values()), free_disk))
    return [need for need in needs if need[1] > SHARE * need[2]]


def open_model(
    checkpoint: Checkpoint,
    device: torch.device,
    architecture: Architecture,
    offload: Offload,
    *,
    tokens: int = 2048,
    progress: Progress = silent,
) -> LoadedModel:
    """A model that is only read: resident, or streamed where it does not fit.

    Args:
        checkpoint: where the weights are.
        device: where to compute.
        architecture: of the checkpoint.
        offload: as for training.
        tokens: of a forward pass.
        progress: makes progress bars.

    Raises:
        SettingsError: if it does not fit.
    """
    shapes: Sequence[MatrixShape] = ()
    plans = footprints(checkpoint, architecture, shapes, device, Workload(tokens, 1, keep_inputs=True))
    plan, _ = choose(plans, device, offload, checkpoint.path)
    if plan.offload == "none":
        return load_model(checkpoint, device, architecture)
    tier: Tier = "cpu" if plan.offload == "cpu" else "disk"
    return load_streamed(checkpoint, device, tier, architecture, keep_inputs=True, progress=progress)
