"""Suites of continual runs, several side by side, each through `sculptor continual`; prints one line per run.

    python tests/benchmarks/continual.py SUITE --model DIR --data DIR --output DIR [--gpus 1] [--jobs 8] [--deadline 540]

DATA holds cl/<task>/{train,validation,test}.jsonl and text/{general,wikitext2-test}.txt. Results of runs that finished
are in OUTPUT/results.jsonl; those that are there are not run again, so a suite goes on where it was stopped.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Content = dict[str, Any]  # of continual.json

ORDERS = {
    "1": ("dbpedia", "amazon", "yelp", "agnews"),
    "2": ("agnews", "yelp", "amazon", "dbpedia"),
    "6": ("dbpedia", "amazon", "yelp", "agnews", "sst2", "rte"),
    "6r": ("rte", "sst2", "agnews", "yelp", "amazon", "dbpedia"),
    "said": ("extract", "tools", "gsm8k", "style"),  # tests/benchmarks/generated.py
}


@dataclass(frozen=True)
class Run:
    """One line of a suite."""

    order: str
    method: str
    rate: float
    sets: tuple[str, ...] = field(default=())
    seed: int = 0
    split: str = "validation"

    @property
    def name(self) -> str:
        """Says everything that differs."""
        parts = [f"o{self.order}", self.method, f"{self.rate:g}", *self.sets, f"s{self.seed}", self.split[:4]]
        return " ".join(parts)


def plan_text(model: Path, data: Path, run: Run) -> str:
    """The plan of one run, at the budgets of the comparison."""
    calibration = f'''basis = "curvature"
data = ["{data}/text/general.txt"]
max_length = 256
calibration_tokens = 98304
'''
    tasks = "".join(
        f'[[tasks]]\nname = "{task}"\n'
        + "".join(
            f'{key} = "{data}/cl/{task}/{file}.jsonl"\n'
            for key, file in (("data", "train"), ("validation", "validation"), ("test", "test"))
        )
        for task in ORDERS[run.order]
    )
    return f'''model = "{model}"
watch = ["{data}/text/wikitext2-test.txt"]
[analyze]
{"" if "analyze.basis=weights" in run.sets else calibration}[train]
epochs = 2
max_rows = 3000
batch_size = 32
micro_batch_size = 32
max_length = 512
schedule = "linear"
checkpoint_activations = false
save_every = 100000
learning_rate = {run.rate}
[evaluate]
exact_match = false
max_length = 512
batch_size = 128
{tasks}'''


INPUTS = ("analyze.basis=inputs", "analyze.budget=0.5", "train.soften=0")
WEIGHTS = ("analyze.basis=weights", "analyze.preserve=0.5")
# The sweep was run before the defaults followed from it; here are those of that time.
GRADIENTS = ("analyze.weighting=gradients", "analyze.threshold=matrix", "train.soften=0")
TOKENS = ("analyze.weighting=tokens", "analyze.threshold=matrix", "train.soften=0")


def curvature(order: str, rate: float, *sets: str, seed: int = 0) -> Run:
    """A variation of curvature."""
    return Run(order, "sculptor", rate, sets, seed)


SUITES: dict[str, list[Run]] = {
    "smoke": [Run("1", "sculptor", 5e-4), Run("1", "full", 3e-4)],
    "sweep": [
        *(curvature(o, rate, *GRADIENTS) for rate in (5e-4, 7e-4, 1e-3) for o in "12"),
        *(curvature(o, 1e-3, *GRADIENTS, f"train.soften={soft}") for soft in (10, 100) for o in "12"),
        curvature("2", 5e-4, *TOKENS),
        curvature("1", 5e-4, *GRADIENTS, "analyze.keep=1.0"),
        *(curvature("1", 5e-4, *GRADIENTS, f"analyze.budget={budget}") for budget in (0.5, 0.75, 0.9)),
        *(curvature(o, 5e-4, *GRADIENTS, "analyze.threshold=model") for o in "12"),
        *(curvature(o, 5e-4, *GRADIENTS, "analyze.fisher=sampled") for o in "12"),
        *(curvature("1", 5e-4, *GRADIENTS, f"train.memory_rows={rows}") for rows in (48, 1536)),
        *(Run("1", "full", rate) for rate in (1e-4, 1e-3)),
        *(Run("1", "joint", rate) for rate in (3e-4, 1e-3)),
        *(Run("1", "sculptor", rate, INPUTS) for rate in (3e-4, 1e-3)),
        Run("2", "joint", 5e-4),
        Run("2", "full", 3e-4),
        Run("2", "sculptor", 5e-4, INPUTS),
        *(curvature(o, 5e-4, *GRADIENTS, 'analyze.data=["self"]') for o in "12"),
        *(curvature("1", 1e-3, *GRADIENTS, "analyze.budget=1.0", f"train.soften={soft}") for soft in (100, 1000)),
        curvature("1", 1e-3, *GRADIENTS, "train.soften=1"),
        curvature("1", 7e-4, *GRADIENTS, "train.soften=10"),
        *(Run("1", "sculptor", rate, WEIGHTS) for rate in (3e-4, 5e-4, 1e-3)),
        *(Run("1", "random", rate) for rate in (3e-4, 5e-4, 1e-3)),
        *(Run("1", "osf", rate) for rate in (3e-4, 5e-4)),
        *(Run("1", "olora", rate) for rate in (1e-3, 4e-3)),
        *(Run("1", "lora", rate) for rate in (5e-4, 1e-3, 2e-3)),
        curvature("1", 5e-4, *GRADIENTS, "analyze.keep=0.25", "analyze.budget=0.8"),
        curvature("1", 5e-4, *GRADIENTS, "analyze.keep=1.0", "analyze.steps=16"),
        curvature("1", 5e-4, *GRADIENTS, "train.memory_weight=2.0"),
        curvature("1", 5e-4, *GRADIENTS, "analyze.keep=0.75", "analyze.budget=0.4"),
        curvature("1", 5e-4, *GRADIENTS, "train.memory_rows=96"),
        curvature("1", 5e-4, *GRADIENTS, seed=1),
        curvature("1", 5e-4, *TOKENS, seed=1),
    ],
}


BOTH, OWN = 'analyze.data=["GENERAL","self"]', 'analyze.data=["self"]'
MODEL_WIDE = ("analyze.weighting=gradients", "analyze.threshold=model")
# What the sweep left open, on validation rows.
CANDIDATES: list[tuple[float, tuple[str, ...]]] = [
    (7e-4, (*MODEL_WIDE, BOTH)),
    (1e-3, (*MODEL_WIDE, BOTH, "train.soften=1")),
    (1e-3, (*MODEL_WIDE, BOTH, "train.soften=3")),
    (1e-3, (*MODEL_WIDE, OWN, "train.soften=2")),
    (7e-4, (*MODEL_WIDE, BOTH, "train.memory_weight=2.0")),
    (1e-3, (*MODEL_WIDE, BOTH, "train.soften=3", "analyze.budget=0.75")),
    (1e-3, (*MODEL_WIDE, BOTH, "train.soften=1", "train.memory_weight=2.0")),
]
CHOSEN = (1e-3, (*MODEL_WIDE, BOTH, "train.soften=3"))
SUITES["candidates"] = [Run(o, "sculptor", rate, sets) for rate, sets in CANDIDATES for o in "12"]


def chosen(order: str, *sets: str, seed: int = 0, data: str = BOTH, split: str = "test") -> Run:
    """What the candidates led to, which is also the product's default, with something changed."""
    rate, chosen_sets = CHOSEN
    return Run(order, "sculptor", rate, (*(item for item in chosen_sets if item != BOTH), data, *sets), seed, split)


# The long ones first: they start on the GPU with the fewest neighbours.
SUITES["headline"] = [
    chosen("6"),
    Run("6", "full", 3e-4, (), 0, "test"),
    *(chosen(o, seed=seed) for seed in (0, 1, 2) for o in "12"),
    *(Run(o, "sculptor", 5e-4, INPUTS, seed, "test") for seed in (0, 1, 2) for o in "12"),
    *(chosen(o, data=data) for data in ('analyze.data=["GENERAL"]', OWN) for o in "12"),
    *(Run(o, "full", 3e-4, (), seed, "test") for seed in (0, 1, 2) for o in "12"),
    *(Run(o, "sculptor", 1e-3, WEIGHTS, 0, "test") for o in "12"),
    *(Run(o, "random", 1e-3, (), 0, "test") for o in "12"),
    *(chosen("1", *sets, split="validation") for sets in ([], ["analyze.steps=2"], ["analyze.steps=15"])),
    *(Run("1", "joint", 5e-4, (), seed, "test") for seed in (0, 1, 2)),
    *(Run(o, "osf", 5e-4, (), 0, "test") for o in "12"),
    *(Run(o, "olora", 2e-3, (), 0, "test") for o in "12"),
    *(Run(o, "lora", 2e-3, (), 0, "test") for o in "12"),
    *(
        chosen("1", *sets, split="validation")
        for sets in (["analyze.budget=1.0"], ["analyze.keep=0.25", "analyze.budget=0.8"], ["analyze.budget=0.8"])
    ),
]


# More steps follow the threshold more closely.
SUITES["steps"] = [
    *(
        chosen(o, f"analyze.steps={steps}", seed=seed, split="validation")
        for steps in (7, 15, 31)
        for seed in (1, 2)
        for o in "12"
    ),
    *(chosen(o, "analyze.steps=15", seed=seed) for seed in (0, 1, 2) for o in "12"),
]


def main() -> None:
    run_suites(SUITES, plan_text, __doc__ or "")


def run_suites(
    suites: dict[str, list[Run]],
    text_of: Callable[[Path, Path, Run], str],
    doc: str,
    after: Callable[[argparse.Namespace, Run], list[str]] = lambda *_: [],
    follow: Callable[[dict[Run, Content | None]], list[Run]] = lambda _: [],
) -> None:
    """The command line: runs one of some suites, several runs side by side.

    Args:
        suites: by name.
        text_of: model, data and a run to its plan.
        doc: of the command.
        after: a command for a run that is given its output, too, and prints a line of JSON that goes with its results.
        follow: what is to be run next, of what came out so far, None of runs that failed; what it named before counts once.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=suites)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--first-gpu", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=8, help="processes per GPU")
    parser.add_argument("--last-jobs", type=int, help="processes on the last GPU, which takes the first runs")
    parser.add_argument("--deadline", type=float, default=540, help="seconds after which what still runs is stopped")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    waiting = list(enumerate(suites[arguments.suite]))
    known, done = {run for _, run in waiting}, dict[Run, Content | None]()
    before = finished_before(arguments.output / "results.jsonl")
    while found := [run for _, run in waiting if run.name in before]:  # what follows from them may be there, too
        done |= {run: before[run.name] for run in found}
        more = [one for one in follow(done) if one not in known]
        waiting = [item for item in waiting if item[1] not in done] + list(enumerate(more, len(known)))
        known.update(more)
    last = arguments.jobs if arguments.last_jobs is None else arguments.last_jobs
    slots = [
        gpu
        for gpu in reversed(range(arguments.gpus))
        for _ in range(last if gpu == arguments.gpus - 1 else arguments.jobs)
    ]
    running: dict[int, tuple[int, Run, subprocess.Popen[bytes], float]] = {}
    with open(arguments.output / "results.jsonl", "a", encoding="utf-8") as results:
        while waiting or running:
            now = time.perf_counter() - started
            for slot, gpu in enumerate(slots):
                if slot not in running and waiting and now < arguments.deadline - 60:
                    number, run = waiting.pop(0)
                    text = text_of(arguments.model.resolve(), arguments.data.resolve(), run)
                    process = start(run, number, arguments.first_gpu + gpu, arguments, text, after(arguments, run))
                    running[slot] = number, run, process, now
            for slot, (number, run, process, began) in list(running.items()):
                if process.poll() is not None:
                    done[run] = report(run, number, now - began, arguments.output, results)
                    del running[slot]
                    more = [one for one in follow(done) if one not in known]
                    waiting[:0] = list(enumerate(more, len(known)))
                    known.update(more)
            if now > arguments.deadline:
                for number, run, process, began in running.values():
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    print(f"{run.name:70} stopped at the deadline", flush=True)
                    if (arguments.output / f"{number:03d}" / "continual.json").is_file():
                        report(run, number, now - began, arguments.output, results)  # what came after it is missing
                    else:
                        salvage(run, arguments.output / f"{number:03d}.partial" / "scores.json", results)
                break
            time.sleep(0.5)
    print(f"{len(waiting)} runs not started; {time.perf_counter() - started:.0f} s", flush=True)


def finished_before(results: Path) -> dict[str, Content]:
    """Results of runs by name, of a call before."""
    if not results.is_file():
        return {}
    lines = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {line["run"]: line for line in lines if "run" in line}


def start(
    run: Run, number: int, gpu: int, arguments: argparse.Namespace, text: str, after: list[str]
) -> subprocess.Popen[bytes]:
    """Starts one run on one GPU, and what comes after it."""
    plan, output = arguments.output / f"{number:03d}.toml", arguments.output / f"{number:03d}"
    plan.write_text(text, encoding="utf-8")
    general = str(arguments.data.resolve() / "text" / "general.txt")
    sets = [item for override in run.sets for item in ("--set", override.replace("GENERAL", general))]
    command = [
        sys.executable, "-c", "from sculptor_cli.main import run; run()", "continual", str(plan), "--json",
        "--output", str(output), "--method", run.method, "--seed", str(run.seed),
        "--split", run.split, *sets,
    ]  # fmt: skip
    line = f"{shlex.join(command)} > /dev/null"
    if after:
        line += f" && {shlex.join([*after, str(output)])} > {shlex.quote(str(output))}.after"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    with open(f"{output}.log", "wb") as log:
        return subprocess.Popen(["sh", "-c", line], stderr=log, env=environment, start_new_session=True)


def salvage(run: Run, scores: Path, results: TextIO) -> None:
    """Keeps the stages of a run that was stopped, as `stopped` in the place of `run`."""
    if scores.is_file():
        stages = json.loads(scores.read_text(encoding="utf-8"))["stages"]
        print(json.dumps({"stopped": run.name, "stages": stages}), file=results, flush=True)


def report(run: Run, number: int, seconds: float, output: Path, results: TextIO) -> Content | None:
    """Prints and keeps the result of a run, and removes its checkpoint; None if it failed."""
    path = output / f"{number:03d}" / "continual.json"
    if not path.is_file():
        error = (output / f"{number:03d}.log").read_text(encoding="utf-8", errors="replace").strip()
        print(f"{run.name:70} FAILED {error[-300:]}", flush=True)
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    metrics = content["metrics"]
    figures = [f"{key[:3].upper()} {100 * value:+6.2f}" for key, value in metrics.items() if value is not None]
    more = output / f"{number:03d}.after"
    content["after"] = json.loads(more.read_text(encoding="utf-8") or "{}") if more.is_file() else {}
    figures += [] if content["harm"] is None else [f"harm {content['harm']['nats']:.4f}"]
    figures += [f"{key} {value:.4f}" for key, value in content["after"].items()]
    print(
        f"{run.name:70} {' '.join(figures)} general {content['watch_rise']:+.3f} "
        f"{'/'.join(f'{100 * value:.1f}' for value in content['matrix'][-1])} {seconds:.0f} s",
        flush=True,
    )
    print(json.dumps(content | {"run": run.name, "wall": seconds}), file=results, flush=True)
    shutil.rmtree(path.parent)
    return content


if __name__ == "__main__":
    main()
