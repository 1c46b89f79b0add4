"""Decomposition and analysis: time against torch.linalg.svd, accuracy against it, and peak memory.

python tests/benchmarks/analysis.py [--device cuda]              one matrix of 4096 x 4096 and 4096 x 11008
python tests/benchmarks/analysis.py --model DIR [--device cuda]  a whole checkpoint, and inspecting its archive
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sculptor.numerics.linalg import singular_subspaces

RUN = "from sculptor_cli.main import run; run()"


def time_of(work: object, device: torch.device) -> float:
    """Seconds of a call, the device's queue included."""
    assert callable(work)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def one_matrix(m: int, n: int, device: torch.device) -> None:
    """Gram route against SVD, both from bf16 weights."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(m, n, generator=generator, device=device).to(torch.bfloat16)
    k = min(m, n) // 2
    singular_subspaces(weight[:256, :256], 64)  # libraries loaded
    torch.linalg.svd(weight[:256, :256].float())
    ours = time_of(lambda: singular_subspaces(weight, k), device)
    svd = time_of(lambda: torch.linalg.svd(weight.float(), full_matrices=False), device)
    found = singular_subspaces(weight, k)
    u = torch.linalg.svd(weight.double(), full_matrices=False)[0][:, :k]
    stored = found.left.float().double()
    error = float(torch.linalg.matrix_norm(stored @ stored.T - u @ u.T, 2))
    print(
        f"{m} x {n}: float64 Gram {ours:.2f} s, float32 SVD {svd:.2f} s, ratio {svd / ours:.1f}; projector error {error:.1e}"
    )


def peak_of(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory in GB of one sculptor command in a process of its own."""
    code = f"import resource, sys; sys.argv = ['sculptor', *sys.argv[1:]]\ntry:\n    {RUN}\nfinally:\n    " + (
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    started = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    return seconds, int(found.stderr.rsplit("PEAK", 1)[1]) * 1024 / 1e9


def whole_checkpoint(model: Path, device: str) -> None:
    """Analysis and inspection of a checkpoint."""
    with tempfile.TemporaryDirectory(dir=model.parent) as work:
        archive = str(Path(work) / "archive")
        seconds, peak = peak_of(["analyze", str(model), "-o", archive, "--preserve", "0.5", "--device", device])
        size = sum(file.stat().st_size for file in Path(archive).glob("*")) / 1e9
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
        print(
            f"analyze: {seconds:.1f} s, peak {peak:.2f} GB resident; {weights:.2f} GB of weights, archive {size:.2f} GB"
        )
        seconds, peak = peak_of(["inspect", archive])
        print(f"inspect: {seconds:.1f} s, peak {peak:.2f} GB resident")


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.model is not None:
        whole_checkpoint(options.model, options.device)
    else:
        for n in (4096, 11008):
            one_matrix(4096, n, torch.device(options.device))


if __name__ == "__main__":
    main()
