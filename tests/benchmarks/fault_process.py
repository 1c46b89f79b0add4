"""The process of a command, and one fault at one of its file operations.

A command runs in a fork of a process that has imported everything, or, to see that this makes no difference, in a new one:

    python tests/benchmarks/fault_process.py JSON
"""

import builtins
import errno
import io
import json
import os
import signal
import subprocess
import sys
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
from sculptor_cli.main import run

# FULL: ENOSPC from there on, of everything that would need room.
FAULTS = ("ENOSPC", "EIO", "SIGKILL", "FULL")
_PATIENCE = 300  # seconds, after which something hangs
torch.set_num_threads(1)  # threads do not survive a fork, and whoever imports this may have imported torch before


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

    def due(self, needs_room: bool = True) -> bool:
        self.count += 1
        if self.count == self.fault.at:
            os.close(os.open(self.hit, os.O_CREAT))
        if self.fault.kind == "FULL":
            return needs_room and self.count >= self.fault.at > 0
        return self.count == self.fault.at

    def fail(self) -> NoReturn:
        if self.fault.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.EIO if self.fault.kind == "EIO" else errno.ENOSPC
        raise OSError(code, os.strerror(code))

    def point(self, needs_room: bool = True) -> None:
        if self.due(needs_room):
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
                    self.point(event in ("os.mkdir", "os.link", "os.symlink"))

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
    torch.set_num_threads(
        1
    )  # makes anew a pool of threads that a fork has lost, which two new threads would do at once
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


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    here(told[0], Path(told[1]), Path(told[2]), told[3] and Fault(*told[3]))
