"""A full disk, a failing one and SIGKILL at every file operation of a small run, which is then taken up again.

    python tests/benchmarks/faults.py DIR [--commands analyze train-disk] [--faults ENOSPC SIGKILL] [--every 1]
        [--last 30] [--part 1/1]

Each point runs in a process of its own (forked, so that nothing is imported again): it has to end in one line of ours, or be
gone; then the same command goes on with --resume and has to leave, tensor for tensor, what an undisturbed run leaves, and nothing
beside it.
"""

import argparse
import builtins
import contextlib
import errno
import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import save_checkpoint, task_rows, write_rows
from safetensors import safe_open

import sculptor
from sculptor.checkpoint.written import LOCK_NAME, MARKER_NAME
from sculptor.errors import SculptorError

PLAN = """model = "model"
[analyze]
preserve = 0.5
device = "cpu"
[train]
max_steps = 2
save_every = 1
batch_size = 6
device = "cpu"
[[tasks]]
name = "one"
data = ["rows.jsonl"]
test = ["rows.jsonl"]
[[tasks]]
name = "two"
data = ["rows.jsonl"]
test = ["rows.jsonl"]
"""
# What a run that is killed at its very end may leave in a complete output.
LITTER = (LOCK_NAME, MARKER_NAME, "progress.json", "scores.json")


class Injector:
    """Counts file operations below a directory, and fails at one of them."""

    def __init__(self, root: Path, at: int | None, fault: str) -> None:
        self.root, self.at, self.fault, self.count = str(root), at, fault, 0

    def operation(self, path: object) -> None:
        if isinstance(path, int) or not str(path).startswith(self.root):
            return
        self.point()

    def point(self) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.fault == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.fault)
        raise OSError(code, os.strerror(code))

    def install(self) -> None:
        """Renames, removals and new directories by audit events; writes by what writes."""
        watched = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in watched:
                self.operation(os.fsdecode(arguments[0]) if isinstance(arguments[0], bytes | str) else arguments[0])

        sys.addaudithook(audit)
        plain_open, pwritev, injector = builtins.open, os.pwritev, self

        class File:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, content: Any) -> int:
                injector.point()
                return int(self.file.write(content))

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def __enter__(self) -> "File":
                self.file.__enter__()
                return self

            def __exit__(self, *error: object) -> None:
                self.file.__exit__(*error)

            def __iter__(self) -> Iterator[Any]:
                return iter(self.file)

        def opened(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            found = plain_open(file, mode, *arguments, **more)
            inside = not isinstance(file, int) and str(file).startswith(self.root)
            return File(found) if inside and set(mode) & set("wax+") else found

        def written(*arguments: Any) -> int:
            injector.point()
            return pwritev(*arguments)

        builtins.open = opened  # type: ignore[assignment]
        os.pwritev = written  # type: ignore[assignment]


def commands(root: Path) -> dict[str, Callable[[Path, bool], object]]:
    """What is run, given the output and whether to resume."""
    model, archive, rows = root / "model", root / "archive", root / "rows.jsonl"
    weights = sculptor.AnalyzeSettings(preserve=0.5, device="cpu")
    curvature = sculptor.AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu")

    def train(offload: Any) -> Callable[[Path, bool], object]:
        settings = sculptor.TrainSettings(
            max_steps=3, save_every=1, eval_every=1, batch_size=6, offload=offload, device="cpu"
        )
        return lambda output, resume: sculptor.train(
            model, archive, [rows], output, settings, eval_data=[rows], resume=resume
        )

    return {
        "analyze": lambda output, resume: sculptor.analyze(model, output, weights, resume=resume),
        "analyze-curvature": lambda output, resume: sculptor.analyze(model, output, curvature, resume=resume),
        "train": train("none"),
        "train-disk": train("disk"),
        "continual": lambda output, resume: sculptor.continual(root / "plan.toml", output, resume=resume),
    }


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of every tensor below a directory, and the names of all files."""
    found = {}
    for file in sorted(output.rglob("*")):
        name = str(file.relative_to(output))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    value = tensors.get_tensor(key).contiguous().view(torch.uint8).numpy().tobytes()
                    found[f"{name}:{key}"] = hashlib.sha256(value).hexdigest()
        elif file.is_file():
            found[name] = ""
    return found


def in_child(run: Callable[[], object], log: Path) -> str:
    """Runs in a forked process: `done`, `killed`, the error's line, or the end of a traceback."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            run()
            log.write_text("done")
        except SculptorError as error:
            log.write_text("error: " + str(error))
        except BaseException:
            with contextlib.suppress(OSError):
                log.write_text("TRACEBACK " + traceback.format_exc()[-700:])
            code = 1
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else log.read_text()


def try_point(run: Callable[[Path, bool], object], work: Path, expected: dict[str, str], at: int, fault: str) -> str:
    """One injection and what comes after: `ok`, or what is wrong."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    output, log = work / "out", work.parent / "log"
    log.write_text("")

    def disturbed() -> None:
        Injector(work, at, fault).install()
        run(output, False)

    said = in_child(disturbed, log)
    if said.startswith("TRACEBACK") or "\n" in said:
        return said
    if said == "killed" and fault != "SIGKILL":
        return "killed without a signal"
    if output.exists():  # placed; what tidying up left is no part of it
        found, whole = ({n: v for n, v in each.items() if n not in LITTER} for each in (digests(output), expected))
        return "ok" if found == whole else "looks finished and is not"
    again = in_child(lambda: run(output, True), log)
    if again != "done":
        return f"after {said[:200]!r}: {again}"
    found = digests(output)
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        return f"after {said[:100]!r}: {len(wrong)} differ, first {wrong[0]}"
    beside = sorted(item.name for item in work.iterdir() if item.name != "out")
    return "ok" if not beside else f"left beside it: {beside}"


def main() -> None:
    """Every command, fault and point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--commands", nargs="*", default=["analyze", "analyze-curvature", "train", "train-disk", "continual"]
    )
    parser.add_argument("--faults", nargs="*", default=["ENOSPC", "EIO", "SIGKILL"])
    parser.add_argument("--every", type=int, default=1, help="only every so many points")
    parser.add_argument("--last", type=int, help="only so many points at the end, where the output is placed")
    parser.add_argument("--part", default="1/1", help="I/N: of the points, those of the I-th of N processes")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    torch.set_num_threads(1)  # threads do not survive a fork
    root = options.directory.resolve()
    root.mkdir(parents=True, exist_ok=True)
    save_checkpoint(root / "model", max_shard_size="40KB")
    write_rows(root / "rows.jsonl", task_rows(count=6))
    (root / "plan.toml").write_text(PLAN)
    log = root / "log"
    log.write_text("")
    archive = sculptor.AnalyzeSettings(preserve=0.5, device="cpu")
    print("archive:", in_child(lambda: sculptor.analyze(root / "model", root / "archive", archive), log))
    wrong = 0
    for name in options.commands:
        run, work = commands(root)[name], root / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        count = root / "count"

        def counted(run: Any = run, work: Path = work, count: Path = count) -> None:
            injector = Injector(work, None, "")
            injector.install()
            run(work / "out", False)
            injector.root = "nowhere"
            count.write_text(str(injector.count))

        assert in_child(counted, log) == "done", log.read_text()
        expected, points = digests(work / "out"), int(count.read_text())
        for fault in options.faults:
            began, results = time.perf_counter(), Counter[str]()
            first = 1 if options.last is None else max(1, points + 1 - options.last)
            for at in range(first + (part - 1) * options.every, points + 1, parts * options.every):
                found = try_point(run, work, expected, at, fault)
                results[found if found == "ok" else "wrong"] += 1
                if found != "ok":
                    wrong += 1
                    print(f"  {name} {fault} at {at}: {found}", flush=True)
            print(f"{name} {fault}: {points} points, {dict(results)}, {time.perf_counter() - began:.0f} s", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
