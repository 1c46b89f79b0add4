"""Whether two installed revisions give the same bits: archives' tensors, losses, merged tensors.

    python tests/benchmarks/revisions.py OLD NEW --model DIR --data rows.jsonl --text general.txt --output DIR

OLD and NEW are `sculptor` commands, each of an environment of its own. Every case is analyzed, trained (at an explicit rate),
stopped and resumed in one of them, and carried; prints one line per case, and exits with 1 if one differs.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

ANALYSES = {
    "weights double": ["--basis", "weights", "--preserve", "0.5"],
    "weights input": ["--basis", "weights", "--preserve", "0.5", "--constraint", "input"],
    "weights core": ["--basis", "weights", "--preserve", "0.5", "--constraint", "core"],
    "random double": ["--basis", "random", "--preserve", "0.5"],
    "inputs": ["--basis", "inputs", "--calibration-tokens", "4000", "--data", "TEXT", "--no-samples"],
    "curvature": ["--basis", "curvature", "--calibration-tokens", "4000", "--data", "TEXT", "--no-samples"],
}
TRAIN = [
    "--learning-rate",
    "5e-4",
    "--max-rows",
    "48",
    "--batch-size",
    "12",
    "--micro-batch-size",
    "4",
    "--max-length",
    "128",
]
TRAINS = {
    "none": ["--offload", "none"],
    "cpu": ["--offload", "cpu"],
    "disk": ["--offload", "disk"],
    "retake": ["--offload", "none", "--carry", "retake"],
    "openly": ["--offload", "none", "--also-train", "norm"],
}


def tensors(folder: Path) -> dict[str, bytes]:
    """Name -> dtype, shape and bytes of every tensor in a folder's safetensors files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - a file is no mapping
                tensor = opened.get_tensor(name)
                head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                found[name] = head + tensor.contiguous().view(-1).view(dtype=torch.uint8).numpy().tobytes()
    return found


def losses(folder: Path) -> list[tuple[float, float]]:
    """Loss and norm of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def run(command: str, *arguments: str) -> None:
    """Runs a command to its end."""
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command} {' '.join(arguments)}: {done.stderr.strip()}")


def stop_and_resume(command: str, *arguments: str) -> None:
    """Stops a training after its first saved state, and takes it up again."""
    place = Path(arguments[arguments.index("-o") + 1])
    started = subprocess.Popen(
        [command, *arguments, "--save-every", "1"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while started.poll() is None and not any((place.with_name(place.name + ".partial") / "state").glob("step-*")):
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    started.wait()
    if not place.exists():
        run(command, *arguments, "--save-every", "1", "--resume")


def compare(case: str, old: Path, new: Path, parts: tuple[str, ...]) -> bool:
    """Prints what differs between two outputs."""
    different = [f"{part} {name}" for part in parts for name in differing(tensors(old / part), tensors(new / part))]
    if (old / "metrics.jsonl").is_file() and losses(old) != losses(new):
        different.append("losses")
    count = sum(len(tensors(new / part)) for part in parts)
    print(
        f"{case:32} {'same' if not different else 'DIFFERENT: ' + ', '.join(different[:4])} ({count} tensors)",
        flush=True,
    )
    return not different


def differing(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """Names that are not the same in both."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    for name in ("model", "data", "text", "output"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--only", default="", help="a part of the cases' names")
    options = parser.parse_args()
    model, data = str(options.model), str(options.data)
    good = True
    for name, arguments in ANALYSES.items():
        base = options.output / name.replace(" ", "-")
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        chosen = [str(options.text) if item == "TEXT" else item for item in arguments]
        for which in ("old", "new"):
            run(getattr(options, which), "analyze", model, *chosen, "-o", str(base / f"{which}-archive"))
        good &= compare(f"{name}: analyze", base / "old-archive", base / "new-archive", ("",))
        moments = name in ("inputs", "curvature")
        for how, more in TRAINS.items():
            if (moments and how == "retake") or options.only not in f"{name} {how}":
                continue
            rows = ["--memory-rows", "16"] if moments else []
            for which in ("old", "new"):
                command, archive = getattr(options, which), str(base / f"{which}-archive")
                call = ["train", model, "--subspaces", archive, "--data", data, *TRAIN, *rows, *more]
                call += ["-o", str(base / f"{which}-{how}")]
                (stop_and_resume if how == "cpu" else run)(command, *call)
            good &= compare(f"{name}: {how}", base / f"old-{how}", base / f"new-{how}", ("", "subspaces"))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
