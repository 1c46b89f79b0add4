"""What a machine does per second, measured in about a second each."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from sculptor.planning.placement import existing
from sculptor.streaming.transfers import free_host_memory, host_memory

_ASSUMED = {"tflops": 300.0, "link": 25.0, "disk": 2.0}
# Operations of an eigenvalue problem over d^3, at the speed of products: 25, at a tenth of it.
_OF_EIGEN = 250
# Of a symmetric eigenvalue problem measured at this size, larger ones take the cube of the ratio at most.
_MEASURED_SIZE = {"cuda": 2048, "cpu": 512}


def measure_speeds(
    given: Mapping[str, float | None],
    device: torch.device,
    here: bool,
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, float], tuple[str, ...]]:
    """What the machine does, and which figures were measured.

    Args:
        given: TFLOP/s of matrix products, GB/s of the link and of the disk, as far as they are known.
        device: where to compute, `here` whether it is there.
        directory: on the disk that files would go to.
        dtype: of the products.
    """
    measures: dict[str, Callable[[], float]] = {
        "tflops": lambda: _measure_products(device, dtype),
        "link": lambda: _measure_link(device),
        "disk": lambda: _measure_disk(directory),
    }
    speeds: dict[str, float] = {}
    measured = []
    for name, measure in measures.items():
        value = given[name]
        speeds[name] = _ASSUMED[name] if value is None else value
        if value is None and (name == "disk" or (here and (name != "link" or device.type == "cuda"))):
            with suppress(OSError):  # a disk that is full or read-only is assumed to be like others
                speeds[name] = measure()
                measured.append(name)
    speeds["float32"] = speeds["tflops"]
    if device.type == "cpu" and dtype != torch.float32 and "tflops" in measured:
        speeds["float32"] = _measure_products(device, torch.float32)
    speeds["eigen"] = _measure_eigen(device if here else torch.device("cpu"))
    if here and device.type == "cpu":  # beside other work threads wait for each other, ten times as long as it takes
        most = _OF_EIGEN * _MEASURED_SIZE["cpu"] ** 3 / (1e12 * speeds["float32"])
        speeds["eigen"] = min(speeds["eigen"], most)
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


def _measure_products(device: torch.device, dtype: torch.dtype) -> float:
    d = 4096 if device.type == "cuda" else 1024
    a = torch.ones(d, d, dtype=dtype, device=device)
    return 2 * d**3 / _timed(lambda: a @ a, device) / 1e12


def _measure_link(device: torch.device) -> float:
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


def decomposition_seconds(shape: tuple[int, int], eigen: float, kind: str) -> float:
    """Of one matrix, given the measured `eigen`."""
    return eigen * (min(shape) / _MEASURED_SIZE[kind]) ** 3
