"""Saved training state: safetensors and JSON, complete or not there.

A state is a directory `step-NNNNNNNN` that is renamed into place when all of it is written, after which the one
before it is removed. Coordinates mean nothing in other bases, so a fingerprint of the bases goes with them.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tensors import read_header, read_known, write_tensors
from sculptor.errors import OutputError
from sculptor.training.coordinates import same_fingerprint
from sculptor.training.updates import Tensors

STATE_NAME = "state"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands, apart from tensors.

    Attributes:
        step: optimizer steps done.
        best_step: step of the best evaluation so far, None before the first.
        best_loss: its loss.
        metrics_bytes: length of metrics.jsonl at this step.
        first_loss: training loss of the first step, `last_loss` of the last one done.
        tokens: tokens read so far.
        seconds: time spent in the loop so far.
    """

    step: int
    best_step: int | None = None
    best_loss: float | None = None
    metrics_bytes: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0


def has_state(partial: Path) -> bool:
    """Whether a staging directory holds a complete saved state."""
    return any((partial / STATE_NAME).glob("step-????????"))


class StateStore:
    """The saved states of one run.

    Args:
        directory: where they are kept.
        key: everything that has to be the same for a state to be taken up.
        fingerprints: per matrix, numbers that identify its bases.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any], fingerprints: Mapping[str, list[float]]) -> None:
        self.directory = directory
        self.key = json.loads(json.dumps(key))
        self.fingerprints = dict(fingerprints)

    def save(self, position: Position, tensors: Tensors) -> None:
        """Writes a state, one tensor in memory; the one before it goes when this one is complete."""
        target = self.directory / f"step-{position.step:08d}"
        staged = target.with_name(target.name + ".tmp")
        with writing(staged):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        _write(staged / "state.safetensors", tensors)
        content = {"key": self.key, "fingerprints": self.fingerprints, "position": asdict(position)}
        write_json(staged / "state.json", content)
        kept = {target, self._best(position.best_step or 0)}
        with writing(target):
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staged, target)
            for other in self.directory.iterdir():
                if other in kept:
                    continue
                if other.is_dir():
                    shutil.rmtree(other)
                else:
                    other.unlink()

    def save_best(self, step: int, tensors: Tensors) -> None:
        """Keeps the best parameters so far; those before go with the next state."""
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        staged = self.directory / "best.tmp"
        _write(staged, tensors)
        with writing(self._best(step)):
            os.replace(staged, self._best(step))

    def load_best(self, step: int) -> "SavedTensors":
        """The best parameters, of a step that the position names.

        Raises:
            OutputError: if they are not there.
        """
        return SavedTensors(self._best(step))

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
        damaged = OutputError(f"{newest}: this saved state is damaged; pass --overwrite to start anew")
        try:
            content = json.loads((newest / "state.json").read_text(encoding="utf-8"))
            tensors = SavedTensors(newest / "state.safetensors")
        except (ValueError, OSError, OutputError) as cause:
            raise damaged from cause
        if not isinstance(content, dict) or not {"key", "fingerprints", "position"} <= content.keys():
            raise damaged
        different = sorted(name for name in self.key if content["key"].get(name) != self.key[name])
        if different:
            name = different[0]
            raise OutputError(
                f"{newest}: saved by a run with other settings ({', '.join(different)}; {name} was "
                f"{content['key'].get(name)!r}, now {self.key[name]!r}); use the same or pass --overwrite to start anew"
            )
        if not _same_bases(content["fingerprints"], self.fingerprints):
            raise OutputError(
                f"{newest}: its coordinates belong to other bases (this library or device completes them differently); "
                "go on where it was started or pass --overwrite to start anew"
            )
        position = Position(**content["position"])
        if position.best_step is not None:
            self.load_best(position.best_step)
        return position, tensors


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a file, read when asked for.

    Raises:
        OutputError: if it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._infos, _ = read_header(path, OutputError)

    def __getitem__(self, name: str) -> Tensor:
        return read_known(self.path, name, self._infos[name], OutputError)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _write(path: Path, tensors: Tensors) -> None:
    write_tensors(path, [(name, *entry) for name, entry in tensors.entries.items()], tensors.read, {})


def _same_bases(a: Mapping[str, list[float]], b: Mapping[str, list[float]]) -> bool:
    return a.keys() == b.keys() and all(same_fingerprint(a[name], b[name]) for name in a)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the global generators that dropout draws from."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(states["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["random.cuda"], device)
