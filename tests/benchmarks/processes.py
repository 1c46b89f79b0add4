"""Several processes against one: speed of training and of analysis, memory of each process.

    torchrun --nproc-per-node 2 tests/benchmarks/processes.py MODEL WORK --train ARCHIVE [--tokens 16384] [--steps 8] \
        [--parallel replicate --parallel shard] [--offload cpu|bases]
    torchrun --nproc-per-node 2 tests/benchmarks/processes.py MODEL WORK --analyze weights --analyze curvature

Run once per number of processes; WORK keeps outputs apart. Rows are random words of full length, every process has the same
number of tokens in each step. The first three steps are not counted; medians of the others. What Python imports is not in the time
of an analysis. Bytes that a process gets of others in a step are those of the collective calls that were made, as rings move them,
beside what `sculptor estimate` says by formula. Harm is not measured on the way: of so few steps it would be after each one.
With `--no-output` a run ends behind its last step. `--stop-after N --into NAME` leaves a saved state in WORK/NAME.partial, which
`--resume --into NAME` takes up with any number of processes; `--tokens` is then to be chosen so that steps are of as many rows.
"""

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import sculptor
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.staging import partial_path
from sculptor.errors import Stopped
from sculptor.jobs.processes import join
from sculptor.model.samples import read_samples
from sculptor.progress import Bar, silent
from sculptor.training.loop import TrainingLoop
from sculptor.training.settings import Parallel
from sculptor.world import leave

WORDS = [
    "the",
    "of",
    "house",
    "river",
    "stone",
    "music",
    "winter",
    "garden",
    "paper",
    "light",
    "bridge",
    "morning",
    "silver",
    "window",
    "letter",
    "station",
]


def write_rows(path: Path, count: int, tokens: int, model: Path) -> Path:
    """Rows of text that are as long as they may be: of longer ones the rest would be rows, too, of other lengths."""
    from transformers import AutoTokenizer

    if not path.exists():
        tokenizer, drawn = AutoTokenizer.from_pretrained(model), random.Random(0)
        long = (tokenizer(" ".join(drawn.choices(WORDS, k=tokens)))["input_ids"][: tokens - 4] for _ in range(count))
        path.write_text("".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in long))
    return path


class Traffic:
    """Bytes that a process gets of others, on average over processes, noted at every step.

    Rings move n bytes once for a broadcast or a reduction, twice for both, to all but one of the processes.
    """

    TIMES: ClassVar = {"broadcast": 1, "reduce": 1, "all_reduce": 2}

    def __init__(self, size: int) -> None:
        self.share, self.at_steps = (size - 1) / size, list[dict[str, float]]()
        self.bytes = dict.fromkeys(self.TIMES, 0.0)

    def __enter__(self) -> "Traffic":
        self.calls = {name: getattr(dist, name) for name in self.TIMES}
        for name, call in self.calls.items():
            setattr(dist, name, functools.partial(self._counted, name, call))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self.calls.items():
            setattr(dist, name, call)

    def _counted(self, name: str, call: Callable[..., Any], tensor: torch.Tensor, *more: Any, **named: Any) -> Any:
        self.bytes[name] += self.TIMES[name] * self.share * tensor.numel() * tensor.element_size()
        return call(tensor, *more, **named)

    def progress(self, *, total: int, desc: str, unit: str, initial: int = 0) -> Bar:
        """Bars of which that of the steps notes what went by."""
        return self if desc == "train" else silent(total=total, desc=desc, unit=unit, initial=initial)

    def update(self, n: int = 1) -> None:
        self.at_steps.append(dict(self.bytes))

    def set_postfix_str(self, s: str, refresh: bool = True) -> None: ...

    def close(self) -> None: ...

    @property
    def of_a_step(self) -> dict[str, float]:
        """The median of those that are counted, in GB, by kind of call."""
        pairs = list(itertools.pairwise(self.at_steps[2:]))
        return {name: round(statistics.median(b[name] - a[name] for a, b in pairs) / 1e9, 6) for name in self.TIMES}


class Enough(Exception):
    """All that was to be measured has been; in the metrics that come with it."""


def leave_out_output() -> None:
    """Lets a training end behind its last step, where it would save its state, merge and write."""

    def end(loop: TrainingLoop) -> None:
        loop.world.gather(None)  # the first process has written its lines
        text = loop.metrics.read_text()
        loop.world.gather(None)
        raise Enough(text)

    TrainingLoop._save = end  # type: ignore[method-assign]


def train(model: Path, work: Path, archive: Path, parallel: Parallel, options: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of all processes together, from the run's own metrics."""
    world = join(options.device)
    rows = options.tokens // options.length
    data = work / f"rows-{options.length}.jsonl"
    world.once(lambda: write_rows(data, 256, options.length, model))
    output = work / (options.into or f"tuned-{archive.name}-{world.size}-{parallel}")
    settings = sculptor.TrainSettings(
        device=options.device, max_length=options.length, batch_size=rows * world.size, micro_batch_size=options.micro,
        max_steps=options.steps, parallel=parallel, offload=options.offload, carry="keep", learning_rate=1e-5,
        optimizer_dtype=options.optimizer_dtype,
        save_every=10**6, harm_every=10**6 if read_samples(Archive(archive), None) else None,
        checkpoint_activations=options.recompute or None,
    )  # fmt: skip
    started = time.perf_counter()
    stops = itertools.chain([None] * (options.stop_after - 1), itertools.repeat(15))
    with Traffic(world.size) as traffic:
        try:
            sculptor.train(
                model, archive, [data], output, settings, overwrite=not options.resume, resume=options.resume,
                progress=traffic.progress, **({"stop": lambda: next(stops)} if options.stop_after else {}),
            )  # fmt: skip
            text = (output / "metrics.jsonl").read_text()
        except Enough as enough:
            text = str(enough)
        except Stopped:
            text = (partial_path(output) / "metrics.jsonl").read_text()
    whole = time.perf_counter() - started
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    seconds = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(lines[2:])] or [math.nan]
    return {
        "tokens/s": round(lines[-1]["tokens"] / statistics.median(seconds), 1),
        "step s": round(statistics.median(seconds), 3),
        "whole s": round(whole, 1),
        "losses": [round(line["loss"], 5) for line in lines[: options.steps if options.into else 3]],
        "peak GiB": world.gather(_peak()),
        **({"GB from others": traffic.of_a_step} if world.first and world.size > 1 else {}),
    }


def analyze(model: Path, work: Path, basis: str, options: argparse.Namespace) -> dict[str, object]:
    """Seconds of a whole analysis."""
    world = join(options.device)
    data = work / f"calibration-{options.calibration}.jsonl"
    world.once(lambda: write_rows(data, options.calibration // options.length, options.length, model))
    settings = sculptor.AnalyzeSettings(
        basis=basis, device=options.device, **({} if basis == "weights" else {"data": (str(data),), "max_length": options.length}),
        **({"preserve": options.preserve} if basis == "weights" else {}), device_memory=options.device_memory,
    )  # fmt: skip
    inspect_architecture(open_checkpoint(model))  # imports what the model is made of
    world.gather(None)
    started = time.perf_counter()
    sculptor.analyze(model, work / f"{basis}-{world.size}", settings, offload="none", overwrite=True)
    return {"seconds": round(time.perf_counter() - started, 1), "peak GiB": world.gather(_peak())}


def _peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--train", type=Path, action="append", default=[], help="an archive")
    parser.add_argument("--analyze", action="append", default=[], help="a basis")
    parser.add_argument("--parallel", action="append", choices=["auto", "replicate", "shard"], help="repeatable")
    parser.add_argument("--offload", default="none", choices=["none", "bases", "cpu", "auto"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step, per process")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--micro", type=int, help="rows per forward")
    parser.add_argument("--optimizer-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-output", action="store_true")
    parser.add_argument("--into", help="name of the output")
    parser.add_argument("--stop-after", type=int, default=0, help="steps")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--preserve", type=float, default=0.5)
    parser.add_argument("--device-memory", type=float, help="GB that an analysis may take")
    parser.add_argument("--calibration", type=int, default=100_000, help="tokens")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.no_output:
        leave_out_output()
    world = join(options.device)
    jobs = [
        ("analyze", basis, lambda b=basis: analyze(options.model, options.work, b, options))
        for basis in options.analyze
    ]
    jobs += [
        (
            f"train {options.offload} {way}",
            a.name,
            lambda a=a, way=way: train(options.model, options.work, a, way, options),
        )
        for a in options.train
        for way in options.parallel or ["auto"]
    ]
    for what, name, job in jobs:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = job()
        if world.first:
            print(json.dumps({"processes": world.size, "job": f"{what} {name}", **found}), flush=True)
    leave()


if __name__ == "__main__":
    main()
