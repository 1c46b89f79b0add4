"""How long `train` and `analyze` take on a CPU, stage by stage, from operations and what the machine does in a second.

On a GPU launches decide about small models, and this would say too little.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from sculptor.checkpoint.architecture import Architecture, Target
from sculptor.checkpoint.reader import Checkpoint
from sculptor.methods.staircase import StaircaseRule
from sculptor.planning.footprints import Workload, footprints
from sculptor.planning.matrices import PlannedMatrix
from sculptor.planning.speeds import decomposition_seconds

# A step against its products at their best: narrow ones, copies, attention, rounding, AdamW, and harm that is measured on the way.
_BESIDE = 3.0
# A token that is sampled against one of many that are read at once: few rows, and a cache that grows.
_SAMPLED = 12


@dataclass(frozen=True, slots=True)
class Expected:
    """Seconds of each stage, 0 where there is none.

    Attributes:
        analysis: sampling, passes over text, decompositions.
        training: `steps` of it.
        archive: the task's rows measured, and what is known decomposed again.
    """

    analysis: float
    training: float
    archive: float
    steps: int

    @property
    def total(self) -> float:
        """Of all stages."""
        return self.analysis + self.training + self.archive

    def __str__(self) -> str:
        parts = {
            "to analyze": self.analysis,
            f"for {self.steps:,} steps": self.training,
            "for the next archive": self.archive,
        }
        if not self.steps:
            return f"about {_minutes(self.total)} min"
        listed = {name: seconds for name, seconds in parts.items() if seconds >= 30}
        shown = ", ".join(f"{_minutes(seconds)} {name}" for name, seconds in listed.items())
        # Of minutes as they are shown, which are added up.
        whole = f"{sum(map(int, map(_minutes, listed.values())))}" if _add_up(listed.values()) else _minutes(self.total)
        return f"about {whole} min in all" + (f": {shown}" if shown else "")


def _add_up(parts: Collection[float]) -> bool:
    return bool(parts) and all(seconds >= 90 for seconds in parts)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 90 else f"{seconds / 60:.1f}"


def operations_per_token(checkpoint: Checkpoint, sides: Sequence[int], *, gradients: bool) -> float:
    """Of measuring text: forward, backward, and forward again for it; and outer products of every side of a matrix."""
    numbers = sum(prod(info.shape) for info in checkpoint.infos.values())
    return float((8 if gradients else 2) * numbers + 2 * sum(d * d for d in sides))


def sides_of(targets: Sequence[Target], *, gradients: bool) -> list[int]:
    """Of matrices, those that are measured: what several read is measured once."""
    groups = {target.input_group: target.shape[1] for target in targets}
    return [*groups.values(), *((target.shape[0] for target in targets) if gradients else ())]


def decomposing_seconds(matrices: Sequence[PlannedMatrix], speed: float, kind: str) -> float:
    """What decomposing them takes: of moments each side by itself, of what is shared once."""
    shapes: dict[str, tuple[int, int]] = {}
    for matrix in matrices:
        for name in sorted(matrix.rule.orthonormal & matrix.rule.stored().keys()):
            side = matrix.target.shape[0 if name == "output" else 1]
            measured = isinstance(matrix.rule, StaircaseRule) and matrix.rule.moments
            key, shape = (matrix.names[name], (side, side)) if measured else (matrix.target.name, matrix.target.shape)
            shapes[key] = shape
    return sum(decomposition_seconds(shape, speed, kind) for shape in shapes.values())


def measuring_seconds(
    checkpoint: Checkpoint, sides: Sequence[int], tokens: int, speed: float, *, gradients: bool, sampled: bool
) -> float:
    """What tokens take that are read for the moments of some sides, at a speed in TFLOP/s.

    Args:
        checkpoint: the model.
        sides: as `sides_of`.
        tokens: how many.
        speed: of products.
        gradients: whether they are read backward too.
        sampled: whether the model says them first.
    """
    each = operations_per_token(checkpoint, sides, gradients=gradients)
    if sampled:
        each += _SAMPLED * operations_per_token(checkpoint, (), gradients=False)
    return tokens * each / (1e12 * speed)


def expect_analysis(
    checkpoint: Checkpoint,
    sides: Sequence[int],
    tokens: int,
    speeds: Mapping[str, float],
    *,
    gradients: bool,
    sampled: bool,
) -> Expected:
    """Of an analysis on the CPU that decomposes the moment of every side; otherwise as `measuring_seconds`."""
    read = measuring_seconds(checkpoint, sides, tokens, speeds["float32"], gradients=gradients, sampled=sampled)
    decomposed = sum(decomposition_seconds((side, side), speeds["eigen"], "cpu") for side in sides)
    return Expected(read + decomposed, 0.0, 0.0, 0)


def expect(
    checkpoint: Checkpoint,
    architecture: Architecture,
    matrices: Sequence[PlannedMatrix],
    work: Workload,
    steps: int,
    speeds: Mapping[str, float],
    *,
    analyzed: int = 0,
    remembered: int = 0,
) -> Expected:
    """Of a training on the CPU.

    Args:
        checkpoint, architecture: the model.
        matrices: of its archive, or of the one that is made.
        work: a step with tokens as they are on average.
        steps: how many.
        speeds: `tflops` of products as it trains, `float32` of others, `eigen` of `measure_speeds`.
        analyzed: tokens that are sampled and measured before, if any.
        remembered: tokens of the task that are measured after, if any.
    """
    step = footprints(checkpoint, architecture, matrices, torch.device("cpu"), work)["none"]
    sides = sides_of([matrix.target for matrix in matrices], gradients=True)
    measured = partial(measuring_seconds, checkpoint, sides, speed=speeds["float32"], gradients=True)
    decomposed = decomposing_seconds(matrices, speeds["eigen"], "cpu")
    return Expected(
        analysis=measured(analyzed, sampled=True) + decomposed if analyzed else 0.0,
        training=_BESIDE * steps * (step.operations + step.folding) / (1e12 * speeds["tflops"]),
        archive=measured(remembered, sampled=False) + decomposed if remembered else 0.0,
        steps=steps,
    )
