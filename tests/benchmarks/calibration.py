"""Analysis by calibration of a whole checkpoint: time by part, and peak memory.

    python tests/benchmarks/calibration.py MODEL --data general.txt --basis curvature [--device-memory 24] [--tokens 100000]

The archive is written beside MODEL and removed.
"""

import argparse
import resource
import shutil
import time
from pathlib import Path

import torch

from sculptor.analysis import factors
from sculptor.methods.settings import AnalyzeSettings
from sculptor.tasks.analyze import analyze


def main() -> None:
    """Measures one analysis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--basis", choices=["inputs", "curvature"], required=True)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--device-memory", type=float)
    options = parser.parse_args()
    settings = AnalyzeSettings(
        basis=options.basis,
        data=(str(options.data),),
        calibration_tokens=options.tokens,
        max_length=options.max_length,
        keep=options.keep,
        device=options.device,
        device_memory=options.device_memory,
        budget=0.6 if options.keep == 0.5 else 1 - options.keep / 2,
    )
    spent = {"moments": 0.0, "eigenvectors": 0.0}
    timed(factors, "measure_moments", spent, "moments")
    timed(factors, "truncate", spent, "eigenvectors")
    output = options.model.parent / f"{options.model.name}-{options.basis}-archive"
    started = time.perf_counter()
    report = analyze(options.model, output, settings, overwrite=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{options.basis}, {options.tokens} tokens, keep {options.keep:g}, limit {options.device_memory} GB: {seconds:.0f} s "
        f"(moments {spent['moments']:.0f}, eigenvectors {spent['eigenvectors']:.0f}, rest "
        f"{seconds - sum(spent.values()):.0f}); peak {gpu:.1f} GB on the GPU, {host:.1f} GB resident; "
        f"archive {report.archive_bytes / 1e9:.1f} GB"
    )


def timed(module: object, name: str, spent: dict[str, float], part: str) -> None:
    """Replaces a function by itself with a clock."""
    original = getattr(module, name)

    def clocked(*args: object, **kwargs: object) -> object:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[part] += time.perf_counter() - started
        return result

    setattr(module, name, clocked)


if __name__ == "__main__":
    main()
