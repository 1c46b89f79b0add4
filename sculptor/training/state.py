"""Saved training state: safetensors and JSON, complete or not there.

A state is a directory `step-NNNNNNNN` that is renamed into place when all of it is written, after which the one
before it is removed. Coordinates mean nothing in other bases, so a fingerprint of the bases goes with them.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sculptor.archive.writer import save_tensors
from sculptor.checkpoint.staging import write_json, writing
from sculptor.errors import OutputError

STATE_NAME = "state"
FINGERPRINT_TOLERANCE = 1e-4  # rounding is near 1e-6, another basis near 1


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

    def save(self, position: Position, tensors: Mapping[str, Tensor], best: Mapping[str, Tensor] | None) -> None:
        """Writes a state; the one before it goes when this one is complete."""
        target = self.directory / f"step-{position.step:08d}"
        staged = target.with_name(target.name + ".tmp")
        with writing(staged):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
        save_tensors(_on_cpu(tensors), staged / "state.safetensors")
        if best is not None:
            save_tensors(_on_cpu(best), staged / "best.safetensors")
        content = {"key": self.key, "fingerprints": self.fingerprints, "position": asdict(position)}
        write_json(staged / "state.json", content)
        with writing(target):
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staged, target)
            for other in self.directory.iterdir():
                if other != target:
                    shutil.rmtree(other)

    def load(self) -> tuple[Position, dict[str, Tensor], dict[str, Tensor] | None] | None:
        """The newest complete state, or None.

        Raises:
            OutputError: if it belongs to a run with other settings, inputs or bases.
        """
        complete = sorted(self.directory.glob("step-????????")) if self.directory.is_dir() else []
        if not complete:
            return None
        newest = complete[-1]
        content = json.loads((newest / "state.json").read_text(encoding="utf-8"))
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
        best = newest / "best.safetensors"
        return (
            Position(**content["position"]),
            load_file(newest / "state.safetensors"),
            load_file(best) if best.is_file() else None,
        )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _same_bases(a: Mapping[str, list[float]], b: Mapping[str, list[float]]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        len(a[name]) == len(b[name])
        and all(abs(x - y) <= FINGERPRINT_TOLERANCE for x, y in zip(a[name], b[name], strict=True))
        for name in a
    )


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
