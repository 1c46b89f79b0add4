"""One fault at one file operation of one command: the process that it happens in, and what has to hold afterwards.

A command runs in a fork of a process that has imported everything, or, to see that this makes no difference, in a new one:

    python tests/benchmarks/fault_points.py JSON
"""

import builtins
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import few_samples  # noqa: F401
import torch
from safetensors import SafetensorError, safe_open
from sculptor_cli.main import run

FAULTS = ("ENOSPC", "EIO", "SIGKILL")
_PATIENCE = 300  # seconds, after which something hangs
# What a run that is killed at its very end may leave in a complete output, and beside a page.
_LITTER = re.compile(r"(^|/)(\.sculptor\.lock|\.sculptor|progress\.json|[^/]+\.\d+\.tmp)$")


@dataclass(frozen=True)
class Command:
    """A command line; what is added to it when it is given once more; what it adds to; what is there before it."""

    line: str
    again: str = "--resume"
    before: str = ""

    def arguments(self, places: dict[str, Path], line: str | None = None) -> list[str]:
        return [part.format_map(places) for part in (self.line if line is None else line).split()]


@dataclass(frozen=True)
class Fault:
    """Which file operation fails, counted from 1, and how; 0 counts them."""

    at: int
    kind: str


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or the signal's name, and what it said on stderr."""

    code: int | str
    said: str

    @property
    def wrong(self) -> str | None:
        """What a user should not see: anything but success, or one line."""
        lines = self.said.strip().splitlines()
        if isinstance(self.code, str) or "Traceback" in self.said:
            return f"ended with {self.code}: {self.said[-700:]}"
        if self.code == 0:
            return None
        told = [line.startswith("error: ") for line in lines]
        return (
            None
            if told.count(True) == 1 and told[-1]
            else f"exit code {self.code}, and no single line: {self.said[-700:]}"
        )


class Injector:
    """Counts file operations below a directory, and fails at one of them; a write has written half of it then."""

    def __init__(self, root: Path, fault: Fault, hit: Path) -> None:
        self.root, self.fault, self.hit, self.count = str(root), fault, hit, 0

    def inside(self, path: object, folder: int = -1) -> bool:
        if isinstance(path, int):
            return (
                path >= 0
                and os.path.exists(f"/proc/self/fd/{path}")
                and self.inside(os.readlink(f"/proc/self/fd/{path}"))
            )
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        base = os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.join(base, os.fsdecode(path)).startswith(self.root)

    def due(self) -> bool:
        self.count += 1
        return self.count == self.fault.at

    def fail(self) -> NoReturn:
        os.close(os.open(self.hit, os.O_CREAT))
        if self.fault.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.fault.kind)
        raise OSError(code, os.strerror(code))

    def point(self) -> None:
        if self.due():
            self.fail()

    def install(self) -> None:
        """Renames, removals, new directories and files opened to be written by audit events; writes by what writes."""
        # Where among an event's arguments its path's folder is, if it has one.
        watched = {
            "os.rename": 2,
            "os.remove": 1,
            "os.mkdir": 2,
            "os.rmdir": 1,
            "os.truncate": None,
            "os.link": 2,
            "os.symlink": 2,
        }

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if writes and not isinstance(arguments[0], int) and self.inside(arguments[0]):
                    self.point()
            elif event in watched:
                place = watched[event]
                if self.inside(arguments[0], -1 if place is None else arguments[place]):
                    self.point()

        sys.addaudithook(audit)
        plain_open, injector = builtins.open, self

        class File:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, content: Any) -> int:
                if injector.due():
                    self.file.write(content[: len(content) // 2])
                    self.file.flush()
                    injector.fail()
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
            return File(found) if set(mode) & set("wax+") and not isinstance(file, int) and self.inside(file) else found

        def on_descriptor(function: Any) -> Any:
            def called(descriptor: int, *arguments: Any) -> Any:
                if injector.inside(descriptor) and injector.due():
                    if function.__name__ == "pwritev":
                        half = memoryview(arguments[0][0]).cast("B")
                        function(descriptor, [half[: len(half) // 2]], *arguments[1:])
                    injector.fail()
                return function(descriptor, *arguments)

            return called

        builtins.open = io.open = opened  # type: ignore[assignment]
        for name in ("write", "pwrite", "writev", "pwritev", "sendfile", "fsync", "fdatasync", "ftruncate"):
            setattr(os, name, on_descriptor(getattr(os, name)))


def here(arguments: Sequence[str], work: Path, log: Path, fault: Fault | None) -> NoReturn:
    """Runs a command in this process, in the directory of its outputs; counting, it notes how far it came and what was imported."""
    signal.alarm(_PATIENCE)
    os.chdir(work)
    injector = Injector(work, fault or Fault(0, ""), log.with_suffix(".hit"))
    if fault is not None:
        injector.install()
    sys.argv = ["sculptor", *arguments]
    try:
        run()
    finally:
        injector.root = "nowhere"
        if fault is not None and fault.at == 0:
            log.with_suffix(".count").write_text(json.dumps([injector.count, sorted(sys.modules)]))
    raise AssertionError("run does not return")


def forked(arguments: Sequence[str], work: Path, log: Path, fault: Fault | None = None) -> Ended:
    """Runs a command in a fork of this process."""
    child = os.fork()
    if child:
        return _ended(os.waitpid(child, 0)[1], log)
    code: Any = 70
    try:
        for number, place in ((0, "/dev/null"), (1, log.with_suffix(".out")), (2, log)):
            os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if number else 0)), number)
        here(arguments, work, log, fault)
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fresh(arguments: Sequence[str], work: Path, log: Path, fault: Fault | None = None) -> Ended:
    """Runs a command in a new process."""
    told = json.dumps([list(arguments), str(work), str(log), fault and [fault.at, fault.kind]])
    with open(log.with_suffix(".out"), "w") as out, open(log, "w") as said:
        command = [sys.executable, str(Path(__file__).resolve()), told]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said)
    return _ended(-done.returncode if done.returncode < 0 else done.returncode << 8, log)


def _ended(status: int, log: Path) -> Ended:
    code = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(
        code, log.read_text(errors="replace") + log.with_suffix(".out").read_text(errors="replace") * (code == 70)
    )


def digests(work: Path) -> dict[str, str]:
    """SHA-256 of every tensor below a directory, and of the bytes of other files; names of empty folders."""
    found = {}
    for file in sorted(work.rglob("*")):
        name = str(file.relative_to(work))
        if file.is_file():
            try:
                found |= {f"{name}:{key}": value for key, value in _tensors(file)}
            except SafetensorError:  # any other file, or half of one
                content = file.read_bytes().replace(os.fsencode(work), b"")
                found[name] = hashlib.sha256(content).hexdigest()
        elif not any(file.iterdir()):
            found[name + "/"] = ""
    return found


def _tensors(file: Path) -> list[tuple[str, str]]:
    if file.suffix != ".safetensors":
        raise SafetensorError
    with safe_open(file, "pt") as tensors:
        values = {key: tensors.get_tensor(key).contiguous().reshape(-1).view(torch.uint8) for key in tensors.keys()}  # noqa: SIM118
    return [(key, hashlib.sha256(value.numpy().tobytes()).hexdigest()) for key, value in values.items()]


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves; a file that differs from run to run, as one with times does, has no digest here."""

    before: dict[str, str]
    after: dict[str, str]
    points: int
    modules: tuple[str, ...]

    @property
    def places(self) -> set[str]:
        """What is made: a directory, a page, a picture."""
        return {name.split("/")[0].split(":")[0] for name in self.after}

    def wrong(self, found: dict[str, str], *, litter: bool = False, within: str | None = None) -> list[str]:
        """Names that differ from what is expected, all or those of one place."""
        names = {name for name in {*found, *self.after} if within is None or name.split("/")[0].split(":")[0] == within}
        names = {name for name in names if not (litter and _LITTER.search(name))}
        return sorted(name for name in names if name not in found or self.after.get(name) not in ("", found[name]))


def undisturbed(command: Command, places: dict[str, Path]) -> Undisturbed:
    """Runs a command twice, counting."""
    runs = []
    for _ in range(2):
        work, log = _begin(command, places)
        before = digests(work)
        ended = forked(command.arguments(places | {"work": work}), work, log, Fault(0, ""))
        assert ended.code == 0, ended.said
        runs.append((before, digests(work), *json.loads(log.with_suffix(".count").read_text())))
    (before, first, count, modules), (_, second, again, _) = runs
    assert count == again, f"{count} file operations, then {again}"
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    after = {name: value if second[name] == value else "" for name, value in first.items()}
    return Undisturbed(before, after, count, tuple(modules))


def _begin(command: Command, places: dict[str, Path]) -> tuple[Path, Path]:
    """An empty place of this process' own, with what is there before a command, and where is noted what it says."""
    mine = places["root"] / f"process-{os.getpid()}"
    shutil.rmtree(mine, ignore_errors=True)
    work, log = mine / "work", mine / "log"
    work.mkdir(parents=True)
    if command.before:
        ended = forked(command.arguments(places | {"work": work}, command.before), work, log)
        assert ended.code == 0, ended.said
    return work, log


@dataclass(frozen=True)
class Tried:
    """What came of a point: None, or what is wrong; how the disturbed process ended, and what it left."""

    wrong: str | None
    ended: Ended
    left: dict[str, str]


def try_point(
    command: Command, places: dict[str, Path], expected: Undisturbed, fault: Fault, start: Any = forked
) -> Tried:
    """One fault, and what comes after: the same command once more, if something is missing yet."""
    work, log = _begin(command, places)
    places = places | {"work": work}
    ended = start(command.arguments(places), work, log, fault)
    ended = Ended(ended.code, ended.said.replace(str(work), ""))
    if not log.with_suffix(".hit").exists():
        return Tried("the point was not reached", ended, {})
    wrong = None if (ended.code, fault.kind) == ("SIGKILL", "SIGKILL") else ended.wrong
    left: dict[str, str] = {}
    try:
        left = digests(work)
        wrong = wrong or _once_more(command, places, expected, left, log, start)
    except Exception as error:  # a file of ours that cannot be read
        wrong = wrong or f"cannot read what was left: {error}"
    said = ended.said.strip().splitlines() or [""]
    return Tried(wrong and f"after {ended.code} {said[-1][:150]!r}: {wrong}", ended, left)


def _once_more(
    command: Command, places: dict[str, Path], expected: Undisturbed, left: dict[str, str], log: Path, start: Any
) -> str | None:
    """What is wrong with what was left, or with what comes of it when the command is given once more."""
    work, began = places["work"], time.perf_counter()
    if not expected.wrong(left, litter=True):
        return None
    changed = [
        name for name, value in expected.before.items() if left.get(name) not in (value, expected.after.get(name))
    ]
    if changed:
        return f"{len(changed)} of what was there before differ, first {changed[0]}"
    placed = (
        [] if command.before or not command.again else [place for place in expected.places if (work / place).exists()]
    )
    for place in placed:
        if names := expected.wrong(left, litter=True, within=place):
            return f"{place} is there, and {len(names)} differ, first {names[0]}"
    again = start([*command.arguments(places), *(["--overwrite"] if placed else command.again.split())], work, log)
    if again.code != 0 or again.wrong:
        return f"once more: {again.wrong or again.said.strip()}"
    names = [name for name in expected.wrong(digests(work)) if not (placed and _LITTER.search(name))]
    names = [name for name in names if not re.search(r"\.\d+\.tmp$", name)]
    return f"once more ({time.perf_counter() - began:.0f} s): {len(names)} differ, first {names[0]}" if names else None


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    here(told[0], Path(told[1]), Path(told[2]), told[3] and Fault(*told[3]))
