"""A task from end to end, every stage a command in a process of its own, beside plain full fine-tuning of the same build.

    python tests/benchmarks/pipeline.py MODEL DIR [--device cuda] [--rows 1500] [--epochs 2] [--profile train-curvature]

Rows are made: short instructions of a few words that the tokenizer of MODEL knows. Times are those of whole processes,
imports and loading included; `in loop` is what the training loop says of itself.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

RUN = "import sys; from sculptor_cli.main import run; run()"
WORDS = [f"w{i}" for i in range(2000)]


def write_rows(path: Path, count: int, words: int, seed: int) -> Path:
    """Prompts of about so many words, with a completion that depends on the first."""
    choose = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [choose.choice(WORDS) for _ in range(choose.randint(words // 2, words))]
        rows.append({"prompt": " ".join(prompt), "completion": f" {prompt[0]}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(options: argparse.Namespace, name: str, *arguments: object) -> float:
    """Runs `sculptor ARGUMENTS`; its seconds, and its last line shown."""
    profile = ["-m", "cProfile", "-o", str(options.directory / f"{name}.prof")] if options.profile == name else []
    script = options.directory / "run.py"
    script.write_text(RUN)
    started = time.perf_counter()
    found = subprocess.run(
        [sys.executable, *profile, str(script), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if found.returncode:
        raise SystemExit(f"{name}: exit {found.returncode}: {found.stderr.strip().splitlines()[-1:]}")
    return seconds


def in_loop(metrics: Path) -> str:
    """What the loop took: seconds of the last step, and those of the steps after the third."""
    steps = [json.loads(line) for line in metrics.read_text().splitlines() if "loss" in line]
    steps = [step for step in steps if "seconds" in step]
    rate = (steps[-1]["seconds"] - steps[2]["seconds"]) / max(1, len(steps) - 3)
    return f"{steps[-1]['seconds']:.1f} s in loop, {1e3 * rate:.0f} ms a step"


def main() -> None:
    """All stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--tokens", type=int, default=20_000, help="of calibration")
    parser.add_argument("--self-tokens", type=int, default=0, help="sample so many for an analysis with --data self")
    parser.add_argument("--profile", help="a stage to profile, into DIR/STAGE.prof")
    parser.add_argument("--stages", nargs="*", help="only these")
    options = parser.parse_args()
    root, device = options.directory, options.device
    root.mkdir(parents=True, exist_ok=True)
    rows, test = (
        write_rows(root / "rows.jsonl", options.rows, options.words, 1),
        write_rows(root / "t.jsonl", 100, 40, 2),
    )
    calibration = write_rows(root / "c.jsonl", 1 + options.tokens // options.words, 2 * options.words, 3)
    plan = root / "plan.toml"
    plan.write_text(
        f'model = "{options.model.resolve()}"\n[train]\nepochs = {options.epochs}\ndevice = "{device}"\n'
        f'[[tasks]]\nname = "one"\ndata = ["{rows}"]\ntest = ["{test}"]\n'
    )
    common = ["--device", device]
    training = [*common, "--epochs", options.epochs]
    stages: dict[str, list[object]] = {
        "analyze-weights": ["analyze", options.model, "-o", root / "aw", "--preserve", 0.5, *common],
        "analyze-curvature": [
            "analyze", options.model, "-o", root / "ac", "--basis", "curvature", "--data", calibration,
            "--calibration-tokens", options.tokens, *common,
        ],
        "train-weights": ["train", options.model, "--subspaces", root / "aw", "--data", rows, "-o", root / "tw", *training],
        "train-curvature": ["train", options.model, "--subspaces", root / "ac", "--data", rows, "-o", root / "tc", *training],
        "continual-full": ["continual", plan, "-o", root / "full", "--method", "full"],
        "verify": ["verify", options.model, root / "tc", "--subspaces", root / "ac", *common],
        "evaluate": ["evaluate", root / "tc", "--data", test, *common],
    }  # fmt: skip
    if options.self_tokens:
        stages["analyze-self"] = [
            "analyze", options.model, "-o", root / "as", "--basis", "curvature", "--data", "self",
            "--calibration-tokens", options.self_tokens, *common,
        ]  # fmt: skip
    metrics = {"train-weights": "tw", "train-curvature": "tc", "continual-full": "full"}
    for name, arguments in stages.items():
        if options.stages and name not in options.stages:
            continue
        seconds = command(options, name, *arguments)
        found = sorted((root / metrics[name]).rglob("metrics.jsonl")) if name in metrics else []
        print(f"{name:<20} {seconds:>7.1f} s  {in_loop(found[0]) if found else ''}", flush=True)


if __name__ == "__main__":
    main()
