"""Harm that was allowed against harm that was done: runs with --max-harm and without, on samples of the base that none of them saw.

    python tests/benchmarks/harm.py MODEL --data DIR --output DIR [--tasks agnews sst2] [--limits 0.01 0.05] [--watch FILE]

DATA holds <task>/{train,validation}.jsonl. Runs without a limit are at multiples of the default relative rate (--free), those
with one at the multiple --at, which is too hot. Every run is a process of its own; OUTPUT/results.jsonl has those that finished,
and a second call goes on. KL is exact, over the whole vocabulary, of the files that were written.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

FRESH = "fresh.safetensors"
SEED = 7919  # of what no archive is made with


@dataclass(frozen=True)
class Run:
    """A line: a multiple of the default rate, and a limit or None."""

    task: str
    times: float
    limit: float | None

    @property
    def name(self) -> str:
        """Says everything."""
        return f"{self.task}-{self.times:g}" + ("" if self.limit is None else f"-{self.limit:g}")


def prepare(given: argparse.Namespace) -> None:
    """The archive, and samples of the base that neither it nor any training sees."""
    import torch

    import sculptor
    from sculptor.checkpoint.reader import open_checkpoint
    from sculptor.model.load import load_model
    from sculptor.model.samples import draw_samples, write_samples
    from sculptor.progress import silent

    loaded = load_model(open_checkpoint(given.model), torch.device(given.device))
    (given.output / FRESH).write_bytes(write_samples(draw_samples(loaded, given.max_length, SEED, silent)))
    settings = sculptor.AnalyzeSettings(device=given.device)
    sculptor.analyze(given.model, given.output / "subspaces", settings, data="self", overwrite=True)


def one(given: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Trains, and measures what was written."""
    import sculptor
    from sculptor.archive.store import Archive
    from sculptor.training.rates import default_relative_rate

    folder = given.data / run.task
    archive = Archive(given.output / "subspaces")
    settings = sculptor.TrainSettings(
        relative_rate=run.times * default_relative_rate(archive), max_harm=run.limit or 0.0, epochs=given.epochs,
        max_rows=given.rows, batch_size=given.batch_size, max_length=given.max_length, carry="keep", save_every=10**6,
        device=given.device,
    )  # fmt: skip
    output = given.output / run.name
    started = time.perf_counter()
    report = sculptor.train(given.model, archive.path, folder / "train.jsonl", output, settings, overwrite=True)
    seconds = time.perf_counter() - started
    found = figures(given, output, folder / "validation.jsonl")
    before = json.loads((given.output / f"base-{run.task}.json").read_text())
    harm, error = exact_harm(given, output)
    assert report.loop.harm is not None
    return {
        **asdict(run), "seconds": seconds, "loss": report.loop.last_loss, "steering": report.loop.steering_harm,
        "reporting": report.loop.harm.nats, "error": report.loop.harm.error, "fresh": harm, "fresh_error": error,
        **{key: found[key] - before[key] for key in found if key.startswith("rise ")},
        "task_loss": found["task_loss"], "accuracy": found["accuracy"],
    }  # fmt: skip


def figures(given: argparse.Namespace, model: Path, rows: Path) -> dict[str, float]:
    """Loss and accuracy on the task, loss on every watched text."""
    import sculptor

    score = sculptor.evaluate(
        model, rows, watch=given.watch, exact_match=False, max_rows=given.test_rows, max_length=given.max_length,
        device=given.device,
    )  # fmt: skip
    assert score.loss is not None
    found = {"task_loss": score.loss, "accuracy": score.accuracy or float("nan")}
    return found | {f"rise {each.name}": each.loss for each in score.watched}


def exact_harm(given: argparse.Namespace, tuned: Path) -> tuple[float, float]:
    """KL(base || tuned) in nats a token over the whole vocabulary, and its standard error, by two models in memory."""
    import torch

    from sculptor.checkpoint.reader import open_checkpoint
    from sculptor.data.batches import collate
    from sculptor.model.load import load_model
    from sculptor.model.loss import predictions
    from sculptor.model.samples import parse_samples
    from sculptor.numerics.divergence import divergence
    from sculptor.numerics.ratio import ratio_of_sums

    device = torch.device(given.device)
    base, new = (load_model(open_checkpoint(path), device) for path in (given.model, tuned))
    sums, counts = [], []
    with torch.no_grad():
        for sample in parse_samples((given.output / FRESH).read_bytes()).all:
            batch = collate([sample.example], 0).to(device)
            p, q = (predictions(each.model.eval(), batch, "causal").float() for each in (base, new))
            sums.append(float(divergence(p, q).double().sum()))
            counts.append(len(p))
    found = ratio_of_sums(sums, counts)
    return found.mean, found.error


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, without ties."""
    a, b = ([sorted(values).index(value) for value in values] for values in (one, other))
    middle = (len(a) - 1) / 2
    return sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)) / sum((x - middle) ** 2 for x in a)


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and what it comes to."""
    rises = [key for key in rows[0] if key.startswith("rise ")]
    heads = ["run", "steering", "reporting", "fresh, exact", "of limit", "task loss", "accuracy", *rises]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in sorted(rows, key=lambda row: (row["task"], row["limit"] or 9, row["times"])):
        run = Run(row["task"], row["times"], row["limit"])
        share = "" if run.limit is None else f"{row['fresh'] / run.limit:.2f}"
        cells = [run.name, f"{row['steering']:.4f}", f"{row['reporting']:.4f} ± {row['error']:.4f}",
                 f"{row['fresh']:.4f} ± {row['fresh_error']:.4f}", share, f"{row['task_loss']:.4f}",
                 f"{100 * row['accuracy']:.1f}", *(f"{row[key]:+.4f}" for key in rises)]  # fmt: skip
        print("| " + " | ".join(cells) + " |")
    limited = [row["fresh"] / row["limit"] for row in rows if row["limit"] is not None]
    if limited:
        print(
            f"{len(limited)} runs with a limit: harm {mean(limited):.2f} of it on average, {max(limited):.2f} at most"
        )
    for key in rises:
        found = rank_correlation([row["reporting"] for row in rows], [row[key] for row in rows])
        print(f"rank correlation of reported harm and {key}, {len(rows)} runs: {found:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["agnews", "sst2"])
    parser.add_argument("--limits", nargs="*", type=float, default=[0.01, 0.05, 0.2])
    parser.add_argument("--free", nargs="*", type=float, default=[1.0, 4.0], help="multiples of the default rate")
    parser.add_argument("--at", type=float, default=4.0, help="multiple of the default rate where there is a limit")
    parser.add_argument("--watch", nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test-rows", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no run begins")
    parser.add_argument("--only", help="prepare, base:TASK, or a run as JSON: what the processes do")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.only:
        alone(given)
        return
    started = time.perf_counter()
    results = given.output / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    runs = [Run(task, given.at, limit) for limit in given.limits for task in given.tasks]
    runs += [Run(task, times, None) for times in given.free for task in given.tasks]
    runs = [run for run in runs if asdict(run) not in [{key: row[key] for key in asdict(run)} for row in known]]

    def process(what: str) -> bool:
        if time.perf_counter() - started > given.deadline:
            return False
        name = Run(**json.loads(what)).name if what.startswith("{") else what.replace(":", "-")
        with open(given.output / f"{name}.log", "w", encoding="utf-8") as log:
            return subprocess.run([sys.executable, *sys.argv, "--only", what], stdout=log, stderr=log).returncode == 0

    if not (given.output / "subspaces").exists() and not process("prepare"):
        sys.exit(f"prepare failed: see {given.output}/prepare.log")
    bases = [f"base:{task}" for task in given.tasks if not (given.output / f"base-{task}.json").exists()]
    with ThreadPoolExecutor(given.jobs) as pool:
        done = list(pool.map(process, bases))
        if False in done:
            sys.exit(f"the base could not be measured: see {given.output}/base-*.log")
        done += pool.map(process, [json.dumps(asdict(run)) for run in runs])
    print(f"{done.count(False)} of {len(done)} processes failed or were not begun" if False in done else "all done")
    show([json.loads(line) for line in results.read_text().splitlines()])


def alone(given: argparse.Namespace) -> None:
    """One process."""
    if given.only == "prepare":
        prepare(given)
    elif given.only.startswith("base:"):
        task = given.only.removeprefix("base:")
        found = figures(given, given.model, given.data / task / "validation.jsonl")
        (given.output / f"base-{task}.json").write_text(json.dumps(found))
    else:
        row = one(given, Run(**json.loads(given.only)))
        with open(given.output / "results.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()
