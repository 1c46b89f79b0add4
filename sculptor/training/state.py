"""Saved training state: safetensors and JSON, complete or not there.

A state is a directory `step-NNNNNNNN` that is renamed into place when all of it is written, after which the one
before it is removed. Coordinates mean nothing in other bases, so a fingerprint of the bases goes with them.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import JsonValue
from torch import Tensor

from sculptor.checkpoint.durable import make_durable, make_names_durable
from sculptor.checkpoint.run_keys import key_difference
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tensors import digest, in_file_order, read_header, read_known, write_tensors
from sculptor.edits.merge import same_fingerprint
from sculptor.errors import OutputError
from sculptor.training.stepping.updates import LazyTensors
from sculptor.validation import STRICT, Count, Finite, Name, NotNegative, Sha256, parse, read_file, read_json, sign
from sculptor.world import World

T = TypeVar("T")

STATE_NAME = "state"
# All that is written, in the run's directory and in a state.
_STATES = ("step-????????", "step-????????.tmp", "best-????????.safetensors", "best.tmp")
_IN_A_STATE = ("state*.safetensors", "state.json", "state.json.tmp")
_REMEDY = "pass --overwrite to start anew"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands, apart from tensors.

    Attributes:
        step: optimizer steps done.
        best_step: step of the best evaluation so far, None before the first.
        best_loss: its loss.
        metrics_bytes: length of metrics.jsonl at this step.
        first_loss: training loss of the first step, `last_loss` of the last one done, in the last tenth of the run their mean.
        tokens: tokens read so far.
        seconds: time spent in the loop so far.
        harm: on the steering samples, when it was measured last.
        scaled: how many times the update was scaled back for it.
    """

    __pydantic_config__ = STRICT

    step: Count
    best_step: Count | None = None
    best_loss: Finite | None = None
    metrics_bytes: Count = 0
    first_loss: Finite | None = None
    last_loss: Finite | None = None
    tokens: Count = 0
    seconds: NotNegative = 0.0
    harm: Finite | None = None
    scaled: Count = 0


@dataclass(frozen=True, slots=True)
class _State:
    """state.json.

    Attributes:
        key: what has to be the same for the state to be taken up.
        fingerprints: per matrix, numbers that identify its bases.
        position: where the run stands.
        digests: SHA-256 of the bytes of every tensor, and of those of the best parameters, if there are any.
        split: of the work; decides rounding.
    """

    __pydantic_config__ = STRICT

    key: Mapping[str, JsonValue]
    split: Mapping[Name, Count]
    fingerprints: Mapping[Name, tuple[Finite, ...]]
    position: Position
    digests: Mapping[Name, Sha256]
    best_digests: Mapping[Name, Sha256]


def has_state(partial: Path) -> bool:
    """Whether a staging directory holds a complete saved state."""
    return any((partial / STATE_NAME).glob("step-????????"))


def saved_key(directory: Path) -> Mapping[str, Any]:
    """The key of the newest complete state; nothing where there is none, or it cannot be read, which `load` says."""
    newest = max(directory.glob("step-????????"), default=None) if directory.is_dir() else None
    if newest is None:
        return {}
    path = newest / "state.json"
    with suppress(OutputError):
        found = parse(read_file(path, OutputError, _REMEDY), path, OutputError, _REMEDY).get("key")
        return found if isinstance(found, dict) else {}
    return {}


def check_saved(directory: Path, key: Mapping[str, Any]) -> None:
    """Refuses a saved state with another key, as far as it is known: before what takes time. `StateStore.load` compares all.

    Raises:
        OutputError: naming what differs.
    """
    saved, now = saved_key(directory), json.loads(json.dumps(key))
    _check_same(directory, {name: saved.get(name) for name in now} if saved else now, now)


def _check_same(place: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = key_difference(saved, now)
    if different is not None:
        raise OutputError(f"{place}: saved by a run with other settings ({different}); use the same or {_REMEDY}")


class StateStore:
    """The saved states of one run.

    Args:
        directory: where they are kept.
        key: everything that has to be the same for a state to be taken up.
        fingerprints: per matrix, numbers that identify its bases.
        split: how the work is split, which only decides rounding; with other `processes`, the rest of it may differ.
    """

    def __init__(
        self,
        directory: Path,
        key: Mapping[str, Any],
        fingerprints: Mapping[str, list[float]],
        split: Mapping[str, int] | None = None,
    ) -> None:
        self.directory = directory
        self.key = json.loads(json.dumps(key))
        self.split = {"processes": 1} if split is None else dict(split)
        self.fingerprints: Mapping[str, tuple[float, ...]] = {name: tuple(mark) for name, mark in fingerprints.items()}
        self._best_digests: dict[int, Mapping[str, str]] = {}  # by step

    def save(self, position: Position, tensors: LazyTensors) -> None:
        """Writes a state, one tensor in memory; the one before it goes when this one is complete."""
        target = self.directory / f"step-{position.step:08d}"
        staged = target.with_name(target.name + ".tmp")
        with writing(staged):
            _remove(staged)
            staged.mkdir(parents=True, exist_ok=True)
        digests = _write(staged / "state.safetensors", tensors)
        best = self._best_digests.get(position.best_step or 0, {})
        state = _State(self.key, self.split, self.fingerprints, position, digests, best)
        content = json.loads(json.dumps(asdict(state)))
        write_json(staged / "state.json", content | {"sha256": sign(content)})
        kept = {target, self._best(position.best_step or 0)}
        with writing(target):
            _remove(target)
            make_durable(staged)
            os.replace(staged, target)
            make_names_durable(self.directory)
            for pattern in _STATES:
                for other in self.directory.glob(pattern):
                    if other not in kept:
                        _remove(other)

    def save_best(self, step: int, tensors: LazyTensors) -> Mapping[str, str]:
        """Keeps the best parameters so far, and gives their digests; those before go with the next state."""
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        staged = self.directory / "best.tmp"
        self._best_digests[step] = _write(staged, tensors)
        with writing(self._best(step)):
            os.replace(staged, self._best(step))
        return self._best_digests[step]

    def note_best(self, step: int, digests: Mapping[str, str]) -> None:
        """Learns of parameters that another process has saved."""
        self._best_digests[step] = digests

    def load_best(self, step: int) -> "SavedTensors":
        """The best parameters, of a step that the position names.

        Raises:
            OutputError: if they are not there, or not those that were saved.
        """
        return SavedTensors(self._best(step), self._best_digests.get(step, {}))

    def _best(self, step: int) -> Path:
        return self.directory / f"best-{step:08d}.safetensors"

    def load(self) -> "tuple[Position, SavedTensors] | None":
        """The newest complete state, or None.

        Raises:
            OutputError: if it belongs to a run with other settings, inputs or bases, or is damaged.
        """
        complete = sorted(self.directory.glob("step-????????")) if self.directory.is_dir() else []
        if not complete:
            return None
        newest = complete[-1]
        state, tensors = self._read(newest)
        alike = state.split.get("processes") == self.split["processes"]
        now = self.split if alike else {}
        saved = {name: state.split.get(name) for name in now}
        _check_same(newest, {**state.key, **saved}, {**self.key, **now})
        if not _same_bases(state.fingerprints, self.fingerprints):
            raise OutputError(
                f"{newest}: its coordinates belong to other bases (this library or device completes them differently); "
                f"go on where it was started or {_REMEDY}"
            )
        if state.position.best_step is not None:
            self._best_digests[state.position.best_step] = state.best_digests
            self.load_best(state.position.best_step)
        return state.position, tensors

    def _read(self, directory: Path) -> "tuple[_State, SavedTensors]":
        path = directory / "state.json"
        content = parse(read_file(path, OutputError, _REMEDY), path, OutputError, _REMEDY)
        if content.pop("sha256", None) != sign(content):
            raise OutputError(f"{path}: has changed since it was written (its digest differs); {_REMEDY}")
        state = read_json(_State, json.dumps(content), path, OutputError, _REMEDY)
        try:
            return state, SavedTensors(directory / "state.safetensors", state.digests)
        except OutputError as cause:
            raise OutputError(f"{directory}: this saved state is damaged ({cause}); {_REMEDY}") from cause


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a file, read when asked for, each checked against the digest that was saved of it.

    Raises:
        OutputError: if the file is missing or damaged.
    """

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        self.path = path
        self.digests = digests
        self._infos, _ = read_header(path, OutputError)
        if self._infos.keys() != digests.keys():
            raise OutputError(f"{path}: does not hold the tensors that were saved; {_REMEDY}")

    def __getitem__(self, name: str) -> Tensor:
        found = read_known(self.path, name, self._infos[name], OutputError)
        if digest(found) != self.digests[name]:
            raise OutputError(
                f"{self.path}: tensor {name} has changed since it was saved (its digest differs); {_REMEDY}"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _remove(path: Path) -> None:
    """Removes a state, or parameters; what else came to lie in it stays."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for pattern in _IN_A_STATE:
        for file in path.glob(pattern):
            file.unlink()
    with suppress(OSError):
        path.rmdir()


def _write(path: Path, tensors: LazyTensors) -> dict[str, str]:
    """Writes a file and gives the digests of its tensors."""
    digests: dict[str, str] = {}

    def read(name: str) -> Tensor:
        found = tensors.read(name)
        digests[name] = digest(found)
        return found

    write_tensors(path, [(name, *entry) for name, entry in tensors.entries.items()], read, {})
    return digests


def write_together(world: World, tensors: LazyTensors, write: Callable[[LazyTensors], T]) -> T:
    """Writes a file of the tensors of all processes, by the first; those that it lacks come to it one at a time.

    Args:
        world: the processes.
        tensors: that this one has; what several have is taken from the first of them.
        write: reads all of them, in the order of a file.

    Returns:
        What `write` made, in all processes.
    """
    if world.size == 1:
        return write(tensors)
    everything = list(enumerate(world.gather(dict(tensors.entries))))
    found = {name: (rank, entry) for rank, of in reversed(everything) for name, entry in of.items()}
    names = [name for name, *_ in in_file_order([(name, *entry) for name, (_, entry) in found.items()])]
    coming = world.in_order(names, lambda name: [tensors.read(name)], [found[name][0] for name in names])
    made: Any = None
    with world.together():
        try:
            if world.first:
                made = write(LazyTensors({name: found[name][1] for name in names}, lambda _: next(coming)))
        finally:
            for _ in coming:  # what is under way: of the others, all of theirs
                pass
    result: T = world.from_first(made)
    return result


def _same_bases(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> bool:
    return a.keys() == b.keys() and all(same_fingerprint(a[name], b[name]) for name in a)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the global generators that dropout draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def by_rank(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Those of several processes, by names of their own."""
    return {name + _of_rank(i): value for i, state in enumerate(states) for name, value in state.items()}


def set_random_state(states: Mapping[str, Tensor], device: torch.device, rank: int = 0) -> None:
    """The inverse of `random_state`, for one of several processes; one that was not there before begins anew."""
    on_cpu, on_gpu = (f"random.{place}{_of_rank(rank)}" for place in ("cpu", "cuda"))
    fresh = int(states["random.cpu"].long().sum()) + rank
    if on_cpu in states:
        torch.set_rng_state(states[on_cpu])
    else:
        torch.manual_seed(fresh)
    if device.type == "cuda" and on_gpu in states:
        torch.cuda.set_rng_state(states[on_gpu], device)
    elif device.type == "cuda":  # saved by a run on a CPU
        with torch.cuda.device(device):
            torch.cuda.manual_seed(fresh)


def _of_rank(rank: int) -> str:
    return f".{rank}" if rank else ""
