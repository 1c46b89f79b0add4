"""What has to hold after a fault at one file operation of a command, and after the same command once more."""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_process import Ended, Fault, forked
from safetensors import SafetensorError, safe_open

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


_SECONDS = re.compile(rb"(?<=>)\d+(?=</td>)|\d+(?= s of training)")


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
                if file.suffix == ".html":  # whole seconds, which two undisturbed runs may agree on
                    content = _SECONDS.sub(b"", content)
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
