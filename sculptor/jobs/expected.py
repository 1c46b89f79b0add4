"""Says how long a training will take, before it begins: on a CPU, where that is minutes."""

from collections.abc import Callable, Mapping, Sequence

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.examples import Example
from sculptor.jobs.defaults import tokens_for
from sculptor.jobs.memory import rows_for
from sculptor.jobs.on_this_machine import on_this_machine
from sculptor.methods.method import carries_of
from sculptor.methods.settings import AnalyzeSettings
from sculptor.model.load import resolve_device
from sculptor.planning.expected import Expected, expect
from sculptor.planning.footprints import Workload
from sculptor.planning.matrices import planned_matrices
from sculptor.planning.placement import plan_archive
from sculptor.planning.splits import default_split
from sculptor.training.precision import compute_dtype, decide_precision
from sculptor.training.settings import TrainSettings
from sculptor.training.steps import Steps

_CPU = torch.device("cpu")


def tell_expected(
    checkpoint: Checkpoint,
    architecture: Architecture,
    archive: Archive | None,
    steps: Steps,
    examples: Sequence[Example],
    settings: TrainSettings,
    notice: Callable[[str], object],
) -> None:
    """One line where it is more than two minutes, of one process on a CPU.

    Args:
        checkpoint, architecture: the model.
        archive: its archive; without one it is analyzed first.
        steps: of the run.
        examples: of the task.
        settings: as far as they are known.
        notice: told.
    """
    device = resolve_device(settings.device)
    if device.type != "cpu":
        return
    dtype = compute_dtype(decide_precision(settings.precision, checkpoint, _CPU), _CPU)
    matrices = (
        planned_matrices(architecture.targets, AnalyzeSettings())
        if archive is None
        else plan_archive(archive, architecture)
    )
    merges = settings.carry == "merge" or (
        settings.carry is None and (archive is None or carries_of(archive.method)[0] == "merge")
    )
    rows = settings.memory_rows or rows_for(checkpoint, examples, _CPU)
    micro = default_split(settings, steps.rows, _CPU, steps.longest).rows
    work = Workload(
        round(steps.rows * steps.mean),
        -(-steps.rows // micro),
        recompute=settings.checkpoint_activations is True,
        row=steps.longest,
        micro_rows=micro,
        compute=dtype,
    )
    analyzed = tokens_for(checkpoint, _CPU) if archive is None else 0
    remembered = round(min(rows, len(examples)) * steps.mean) if merges else 0

    def expected(speeds: Mapping[str, float]) -> Expected:
        sizes = checkpoint, architecture, matrices, work, steps.total, speeds
        return expect(*sizes, analyzed=analyzed, remembered=remembered)

    told = on_this_machine(expected, device, dtype)
    if told is not None:
        notice(told)
