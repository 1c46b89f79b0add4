"""A full disk, a failing one and SIGKILL at every file operation of a small run, which is then taken up again.

    python tests/benchmarks/faults.py DIR [--command NAME]... [--fault ENOSPC|EIO|SIGKILL]... [--jobs N] [--every N] [--last N]
        [--at N]...

Each point runs in a process of its own (forked, so that nothing is imported again): it has to end in one line of ours, or be
gone; then the same command goes on with --resume, or is started anew where there is none, and has to leave, tensor for tensor,
what an undisturbed run leaves, and nothing beside it. `--jobs` points run at a time. Ends with a table, and 1 if any point failed.
"""

import argparse
import builtins
import contextlib
import errno
import functools
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
LITTER = (LOCK_NAME, MARKER_NAME, "progress.json")


FAULTS = ("ENOSPC", "EIO", "SIGKILL")
_PATIENCE = 300  # seconds, after which something hangs


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
        """Renames, removals, new directories and files opened to be written by audit events; writes by what writes."""
        watched = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in watched or opened:
                self.operation(os.fsdecode(arguments[0]) if isinstance(arguments[0], bytes | str) else arguments[0])

        sys.addaudithook(audit)
        plain_open, pwritev, sendfile, injector = builtins.open, os.pwritev, os.sendfile, self

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

        def sent(*arguments: Any) -> int:  # as copies of files are
            injector.point()
            return sendfile(*arguments)

        builtins.open = opened  # type: ignore[assignment]
        os.sendfile = sent  # type: ignore[assignment]
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

    def train_on(archive: Path | None, **options: Any) -> Callable[[Path, bool], object]:
        settings = sculptor.TrainSettings(max_steps=2, save_every=1, batch_size=6, device="cpu", **options)
        data, old = [f"{rows}:0.6", f"{root / 'more.jsonl'}:0.4"], {} if archive else {"protect_data": [rows]}
        replay = ["self:0.2"] if archive else []
        return lambda output, resume: sculptor.train(
            model,
            archive,
            data,
            output,
            settings,
            replay=replay,
            resume=resume,
            **old,  # type: ignore[arg-type]
        )

    return {
        "analyze": lambda output, resume: sculptor.analyze(model, output, weights, resume=resume),
        "analyze-curvature": lambda output, resume: sculptor.analyze(model, output, curvature, resume=resume),
        "train": train("none"),
        "train-disk": train("disk"),
        "train-tokens": train_on(root / "sampled", add_tokens=("<new>",), harm_every=1),
        "train-first": train_on(None),
        "edit": lambda output, again: sculptor.edit(
            model, root / "tuned", output, sculptor.Interpolate(alpha=0.5), overwrite=again, device="cpu"
        ),
        "prune": lambda output, again: sculptor.prune(
            model, output, sculptor.Prune(sparsity=0.3, by="magnitude"), overwrite=again
        ),
        "convert": lambda output, again: sculptor.convert(archive, output, model=model, overwrite=again),
        "bank": lambda output, _: sculptor.add_to_bank(output, model, root / "tuned", [rows], name="one"),
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
                    value = tensors.get_tensor(key).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    found[f"{name}:{key}"] = hashlib.sha256(value).hexdigest()
        elif file.is_file():
            found[name] = ""
    return found


def in_child(run: Callable[[], object], log: Path) -> str:
    """Runs in a forked process: `done`, `killed`, the error's line, or the end of a traceback."""
    child = os.fork()
    if child == 0:
        code = 0
        signal.alarm(_PATIENCE)
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
        found, whole = (
            {n: v for n, v in each.items() if Path(n).name not in LITTER} for each in (digests(output), expected)
        )
        wrong = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
        return "ok" if not wrong else f"after {said[:100]!r}: placed, and {len(wrong)} differ, first {wrong[0]}"
    again = in_child(lambda: run(output, True), log)
    if again != "done":
        return f"after {said[:200]!r}: {again}"
    found = digests(output)
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        return f"after {said[:100]!r}: {len(wrong)} differ, first {wrong[0]}"
    beside = sorted(item.name for item in work.iterdir() if item.name != "out")
    return "ok" if not beside else f"left beside it: {beside}"


def prepare(root: Path) -> None:
    """What the commands read; imports what they are made of, so that no child has to."""
    assert all((sculptor.edit, sculptor.prune, sculptor.convert, sculptor.continual))
    save_checkpoint(root / "model", max_shard_size="40KB")
    for name in ("rows", "more"):
        write_rows(root / f"{name}.jsonl", task_rows(count=6))
    (root / "plan.toml").write_text(PLAN)
    for name, samples in (("archive", False), ("sampled", True)):
        settings = sculptor.AnalyzeSettings(preserve=0.5, samples=samples, device="cpu")
        sculptor.analyze(root / "model", root / name, settings)
    settings = sculptor.TrainSettings(max_steps=1, device="cpu")
    sculptor.train(root / "model", root / "archive", [root / "rows.jsonl"], root / "tuned", settings)


def undisturbed(root: Path, name: str) -> tuple[dict[str, str], int]:
    """What a command leaves, and how many points it has."""
    work, count, log = root / "undisturbed", root / "count", root / "log"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()

    def counted() -> None:
        injector = Injector(work, None, "")
        injector.install()
        commands(root)[name](work / "out", False)
        injector.root = "nowhere"
        count.write_text(str(injector.count))

    assert in_child(counted, log) == "done", log.read_text()
    return digests(work / "out"), int(count.read_text())


def one_point(root: Path, name: str, expected: dict[str, str], at: int, fault: str) -> str:
    """One of several that are tried at a time, each process in a place of its own."""
    work = root / f"process-{os.getpid()}" / "work"
    work.parent.mkdir(exist_ok=True)
    return try_point(commands(root)[name], work, expected, at, fault)


def main() -> None:
    """Every command, fault and point."""
    known = list(commands(Path()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--command", action="append", choices=known, help="repeatable [default: all]")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="repeatable [default: all]")
    parser.add_argument("--jobs", type=int, default=1, help="points at a time")
    parser.add_argument("--every", type=int, default=1, help="only every so many points")
    parser.add_argument("--last", type=int, help="only so many points at the end, where the output is placed")
    parser.add_argument("--at", type=int, action="append", help="only this point; repeatable")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    root = options.directory.resolve()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    prepare(root)
    rows, wrong = [], 0
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        for name in options.command or known:
            expected, points = undisturbed(root, name)
            first = 1 if options.last is None else max(1, points + 1 - options.last)
            chosen = options.at or range(first, points + 1, options.every)
            for fault in options.fault or FAULTS:
                began = time.perf_counter()
                failed = 0
                found = pool.map(functools.partial(one_point, root, name, expected, fault=fault), chosen)
                for at, said in zip(chosen, found, strict=True):
                    if said != "ok":
                        failed += 1
                        print(f"{name} {fault} at {at}: {said}", flush=True)
                wrong += failed
                seconds = time.perf_counter() - began
                rows.append((name, fault, f"{len(chosen)} of {points}", len(chosen) - failed, failed, seconds))
    print(f"\n{'command':<18} {'fault':<8} {'points':>12} {'ok':>5} {'failures':>9} {'seconds':>8}")
    for name, fault, tried, ok, failed, seconds in rows:
        print(f"{name:<18} {fault:<8} {tried:>12} {ok:>5} {failed:>9} {seconds:>8.0f}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
