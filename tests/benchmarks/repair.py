"""Repair: a model tuned plainly at several rates, edited every way: general loss back against the task kept.

    python tests/benchmarks/repair.py MODEL OUT --data DIR --task agnews --rates 3e-4 1e-3 3e-3 --device cuda

DIR holds cl/<task>/{train,validation}.jsonl and text/{general,wikitext2-test}.txt. What is in OUT already is not made again, so a
run goes on where it was stopped. Every candidate is a line of OUT/points.jsonl; the tables at the end have, for each edit, the
best task score at a rise of general loss of at most some shares of the damage, and training inside the archive as the last line.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

import sculptor
from sculptor.edits.difference import Edit
from sculptor.edits.interpolate import Even
from sculptor.edits.lines import Layered
from sculptor.edits.pairs import open_pairs
from sculptor.edits.project import Projection
from sculptor.edits.settings import Choose
from sculptor.edits.threshold import Denoised
from sculptor.jobs.edit_choice import Trial, open_trial
from sculptor.model.load import resolve_device

LIMITS = (0.005, 0.02, 0.05, 0.1, 0.3, 1.0)


def main() -> None:
    """Makes models and archives, then the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="agnews")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--text-bytes", type=int, default=60_000)
    parser.add_argument("--calibration-tokens", type=int, default=20_000)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.6, 0.9])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--softs", type=float, nargs="+", default=[0.0, 0.3, 1.0, 3.0])
    parser.add_argument("--project-alphas", type=float, nargs="+", default=[0.6, 0.8, 1.0])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    archives = {budget: analyze(options, budget) for budget in options.budgets}
    for rate in options.rates:
        tuned = tune(options, f"tuned-{rate:g}", plain(options), rate)
        measure(options, f"{rate:g}", tuned, archives)
    measure(options, "inside", tune(options, "inside", archives[options.budgets[0]], None), {})
    print_tables(options)


def analyze(options: argparse.Namespace, budget: float) -> Path:
    """The archive of general text under a budget."""
    output: Path = options.out / f"subspaces-{budget:g}"
    if not output.exists():
        settings = sculptor.AnalyzeSettings(
            basis="curvature", data=(str(options.data / "text" / "general.txt"),), budget=budget, max_length=256,
            calibration_tokens=options.calibration_tokens, device=options.device,
        )  # fmt: skip
        sculptor.analyze(options.model, output, settings)
    return output


def plain(options: argparse.Namespace) -> Path:
    """An archive that protects nothing."""
    output: Path = options.out / "plain-subspaces"
    if not output.exists():
        sculptor.analyze(options.model, output, sculptor.AnalyzeSettings(preserve=0.0, device=options.device))
    return output


def tune(options: argparse.Namespace, name: str, archive: Path, rate: float | None) -> Path:
    """The model after one task, at a rate or the archive's default."""
    output: Path = options.out / name
    if not output.exists():
        settings = sculptor.TrainSettings(
            max_steps=options.steps, max_rows=16 * options.steps, batch_size=16, learning_rate=rate, schedule="linear",
            max_length=512, carry="keep", device=options.device, offload="none",
        )  # fmt: skip
        rows = options.data / "cl" / options.task / "train.jsonl"
        sculptor.train(options.model, archive, [rows], output, settings, overwrite=True)
    return output


def candidates(options: argparse.Namespace, archives: dict[float, Path]) -> Iterator[tuple[str, str, Edit]]:
    """Family, name, edit; those that share what they keep of each matrix one after another."""
    for alpha in options.alphas[:-1]:
        yield "interpolate", f"{alpha:g}", Even(alpha)
    for alpha in (0.0, *options.alphas[:-1]):
        yield "lines", f"{alpha:g}", Layered(alpha)
    for alpha in options.alphas:
        yield "threshold", f"{alpha:g}", Denoised(alpha)
    for budget, path in archives.items():
        archive = sculptor.Archive(path)
        for soft in options.softs:
            for alpha in options.project_alphas:
                yield f"project {budget:g}", f"soft {soft:g} alpha {alpha:g}", Projection(archive, soft, alpha)


def measure(options: argparse.Namespace, rate: str, tuned: Path, archives: dict[float, Path]) -> None:
    """Every candidate that is not in points.jsonl yet."""
    lines = read_points(options)
    done = {(line["rate"], line["family"], line["name"]) for line in lines}
    rows, text = (options.out / name for name in ("rows.jsonl", "watch.txt"))
    with (options.data / "cl" / options.task / "validation.jsonl").open() as file:
        rows.write_text("".join(file.readlines()[: options.rows]))
    whole = (options.data / "text" / "wikitext2-test.txt").read_bytes()[: options.text_bytes]
    text.write_text(whole.decode(errors="ignore"))
    pairs = open_pairs(options.model, tuned, copy_base=True)
    choose = Choose(choose=(str(rows),), watch=(str(text),), max_length=512, batch_size=25)
    trial, _ = open_trial(pairs, choose, resolve_device(options.device), None)
    kept: tuple[object, ...] = ()
    ends: list[tuple[str, str, Edit]] = [("base", "", Even(0.0)), ("tuned", "", Even(1.0))]
    for family, name, edit in [*ends, *(candidates(options, archives) if archives else [])]:
        if kept != (family, getattr(edit, "soft", None)):
            trial.kept.clear()
            kept = family, getattr(edit, "soft", None)
        if (rate, family, name) not in done:
            note(options, trial, {"rate": rate, "family": family, "name": name}, edit)


def note(options: argparse.Namespace, trial: Trial, line: dict[str, str], edit: Edit) -> None:
    """Measures one, and writes it down."""
    with torch.no_grad():
        found = trial.measure(edit)
    text = json.dumps({**line, "task": found.task, "watch": found.watch})
    print(text, flush=True)
    with (options.out / "points.jsonl").open("a") as file:
        file.write(text + "\n")


def read_points(options: argparse.Namespace) -> list[dict[str, object]]:
    """What was measured."""
    path = options.out / "points.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_tables(options: argparse.Namespace) -> None:
    """One table per rate: the best task score within each share of the damage."""
    points = read_points(options)
    for rate in dict.fromkeys(str(point["rate"]) for point in points):
        mine = [point for point in points if point["rate"] == rate]
        ends = {str(point["family"]): point for point in mine if point["family"] in ("base", "tuned")}
        base = float(str(ends["base"]["watch"]))
        damage = float(str(ends["tuned"]["watch"])) - base
        print(
            f"\nrate {rate}: task {ends['base']['task']:.3f} -> {ends['tuned']['task']:.3f}, loss {base:.3f} {damage:+.3f}"
        )
        print("| edit | " + " | ".join(f"{limit:.1%}" for limit in LIMITS) + " |")
        print("|---" * (len(LIMITS) + 1) + "|")
        for family in dict.fromkeys(str(point["family"]) for point in mine):
            row = [best(mine, family, base + limit * damage) for limit in LIMITS]
            print(f"| {family} | " + " | ".join(row) + " |")


def best(points: list[dict[str, object]], family: str, most: float) -> str:
    """The largest task score of an edit at a loss of at most so much, and the number that gave it."""
    within = [point for point in points if point["family"] == family and float(str(point["watch"])) <= most + 1e-9]
    if not within:
        return "-"
    found = max(within, key=lambda point: float(str(point["task"])))
    return (
        f"{100 * float(str(found['task'])):.1f} ({found['name']})"
        if found["name"]
        else f"{100 * float(str(found['task'])):.1f}"
    )


if __name__ == "__main__":
    main()
