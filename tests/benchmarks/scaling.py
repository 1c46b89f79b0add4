"""How the cost of every stage grows with width, depth, free share and tokens of a step.

    python tests/benchmarks/scaling.py [--device cuda] [--json FILE]

Random Llamas, one axis at a time doubled, all else as in the middle. The exponent is log2 of what a doubling costs: 0 is free,
1 grows as the axis does. On a CPU seconds are those that all cores worked, which other programs disturb least; on a GPU they are
the clock's. docs/costs.md has what each stage is expected to cost, and why.
"""

import argparse
import dataclasses
import gc
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step
import torch
import transformers
from shapes import random_checkpoint

from sculptor import AnalyzeSettings, analyze, verify

STAGES = ("analyze weights", "analyze curvature", "plain step", "weights step", "curvature step", "verify")


@dataclasses.dataclass(frozen=True)
class Point:
    """One set of sizes; heads have 64 numbers."""

    width: int = 512
    depth: int = 4
    share: float = 0.6
    tokens: int = 1024


AXES: dict[str, tuple[float, ...]] = {
    "width": (256, 512, 1024), "depth": (2, 4, 8), "share": (0.3, 0.6, 0.9), "tokens": (512, 1024, 2048),
}  # fmt: skip


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock's seconds on a GPU, those of all cores together on a CPU."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of a call."""
    clock = clock_of(device)
    step.synchronize(device)
    started = clock()
    work()
    step.synchronize(device)
    return clock() - started


def measure(point: Point, options: argparse.Namespace, work: Path) -> dict[str, float]:
    """Seconds of every stage at a point."""
    device = torch.device(options.device)
    size = {
        "hidden_size": point.width, "intermediate_size": point.width * 11 // 4, "num_hidden_layers": point.depth,
        "num_attention_heads": max(1, point.width // 64), "num_key_value_heads": max(1, point.width // 64),
        "vocab_size": options.vocabulary,
    }  # fmt: skip
    model = random_checkpoint(work / "model", size, options.tokenizer, options.device)
    rows = work / "text.jsonl"
    rows.write_text(json.dumps({"text": options.word * (2 * options.calibration)}) + "\n", encoding="utf-8")
    settings = AnalyzeSettings(device=options.device)
    weights = dataclasses.replace(settings, basis="weights", preserve=1 - point.share**0.5)
    moments = dataclasses.replace(settings, basis="curvature", data=(str(rows),), budget=point.share,
                                  calibration_tokens=options.calibration, samples=False)  # fmt: skip
    found = {
        "analyze weights": seconds_of(lambda: analyze(model, work / "weights", weights), device),
        "analyze curvature": seconds_of(lambda: analyze(model, work / "curvature", moments), device),
    }
    told = argparse.Namespace(
        model=model, device=options.device, archive=[f"{name}={work / name}" for name in ("weights", "curvature")],
        rows=max(1, point.tokens // options.length), micro=max(1, point.tokens // options.length), length=options.length,
        steps=options.steps, recompute=False, trace=None,
    )  # fmt: skip
    for stage, method in (("plain", "plain"), ("weights", "train weights"), ("curvature", "train curvature")):
        found[f"{stage} step"] = step.run(method, told, clock_of(device))["seconds"]
        gc.collect()
    shutil.copytree(model, work / "copy")
    found["verify"] = seconds_of(lambda: verify(model, work / "copy", work / "weights", device=options.device), device)
    return found


def exponents(axis: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of every stage, over the last doubling of an axis."""
    before, after = rows[-2:]
    doubled = math.log2(after[axis] / before[axis])
    return {stage: math.log2(after[stage] / before[stage]) / doubled for stage in STAGES}


def main() -> None:
    """Every axis."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint whose tokenizer the models get")
    parser.add_argument("--word", default="the ", help="of its vocabulary: what they are calibrated on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--scale", type=float, default=1.0, help="all sizes times this")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens that are calibrated on")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    middle = Point(width=int(512 * options.scale), tokens=max(options.length, int(1024 * options.scale)))
    made = []
    print(f"{'':<16}" + "".join(f"{stage:>18}" for stage in STAGES))
    for axis in options.axes:
        rows = []
        for value in AXES[axis]:
            scaled = value * options.scale if axis in ("width", "tokens") else value
            point = dataclasses.replace(middle, **{axis: type(getattr(middle, axis))(scaled)})
            with tempfile.TemporaryDirectory() as work:
                row = {axis: getattr(point, axis), **measure(point, options, Path(work))}
            rows.append(row)
            print(f"{axis:<8}{row[axis]:>8}" + "".join(f"{row[stage]:>18.3f}" for stage in STAGES), flush=True)
        grows = exponents(axis, rows)
        print(f"{'exponent':<16}" + "".join(f"{grows[stage]:>18.2f}" for stage in STAGES))
        made.append({"axis": axis, "rows": rows, "exponents": grows})
    if options.json:
        options.json.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
