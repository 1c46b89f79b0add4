"""Kills `sculptor analyze` and `sculptor train` at random moments, and checks that they can be taken up.

    python tests/benchmarks/kill.py MODEL DATA [--rounds 20] [--seed 0] [--work DIR]

Every round starts a command, sends SIGKILL at a random moment of its run, checks that nothing looks finished,
takes it up with --resume until it is done, and compares every file with an uninterrupted run: same bytes, but
for the seconds in metrics.jsonl.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COMMAND = [sys.executable, "-c", "from sculptor_cli.main import run; run()"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Polls until the condition holds or the process ends."""
    while not condition() and process.poll() is None:
        time.sleep(0.005)


def same_files(first: Path, second: Path) -> bool:
    """Whether two outputs hold the same files with the same bytes, timings and paths aside."""
    names = [sorted(str(f.relative_to(p)) for f in p.rglob("*") if f.is_file()) for p in (first, second)]
    return names[0] == names[1] and all(_content(first / name) == _content(second / name) for name in names[0])


def _content(file: Path) -> object:
    if file.name == "metrics.jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    if file.name == "sculptor.json":
        content = json.loads(file.read_text())
        content["result"].pop("seconds")
        return content
    if file.name == ".sculptor":  # names, and fingerprints of what is compared here
        return sorted(json.loads(file.read_text())["files"])
    return file.read_bytes()


def kill_once(command: list[str], output: Path, seconds: float) -> int:
    """Kills a run after some seconds and takes it up until it is done; returns how many starts that took."""
    starts = 1
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    partial = output.with_name(output.name + ".partial")
    if partial.exists() and not output.exists():
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 1, refused
        assert "--resume" in refused.stderr, refused
    while not output.exists():
        starts += 1
        subprocess.run([*command, "--resume"], check=True, capture_output=True)
    if partial.exists():  # killed between the rename and the clean-up
        shutil.rmtree(partial)
    return starts


def measure(name: str, command: Callable[[Path], list[str]], work: Path, rounds: int, rng: random.Random) -> bool:
    """All rounds of one command."""
    whole = work / f"{name}-whole"
    started = time.perf_counter()
    subprocess.run(command(whole), check=True, capture_output=True)
    duration = time.perf_counter() - started
    good = resumed = 0
    for i in range(rounds):
        output = work / f"{name}-{i}"
        resumed += kill_once(command(output), output, rng.uniform(0.3, 1.05) * duration) > 1
        good += same_files(whole, output)
        shutil.rmtree(output)
    print(f"{name}: {rounds} rounds of {duration:.1f} s, {resumed} killed and taken up, {good} bit for bit the same")
    return good == rounds


def main() -> None:
    """Runs both commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="sculptor-kill-"))
    rng = random.Random(options.seed)

    def analyze(output: Path) -> list[str]:
        return [*COMMAND, "analyze", options.model, "-o", str(output), "--preserve", "0.5", "--device", "cpu"]

    archive = work / "archive"
    subprocess.run(analyze(archive), check=True, capture_output=True)

    def train(output: Path) -> list[str]:
        rest = ["--max-steps", str(options.steps), "--save-every", "3", "--batch-size", "4", "--max-length", "64"]
        return [*COMMAND, "train", options.model, "--subspaces", str(archive), "--data", options.data,
                "--eval-data", options.data.replace("train", "validation"), "--eval-every", "10",
                "--device", "cpu", "-o", str(output), *rest]  # fmt: skip

    passed = [
        measure(name, command, work, options.rounds, rng) for name, command in (("analyze", analyze), ("train", train))
    ]
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
