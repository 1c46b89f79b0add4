"""How a step is split into forward passes, and whether they keep their activations: the fastest of what fits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from sculptor.planning.footprints import Footprint, Workload
from sculptor.planning.placement import SHARE, available_memory
from sculptor.training.settings import MICRO_ROWS, Offload, TrainSettings

# Tokens of a forward pass from which on a GPU is busy: more of them gain less than recomputing activations costs.
_BUSY = 16_384
# What activations may take beyond their estimate. Of Llama's shapes on an H100 they take 0.77 to 0.83 of it.
_MARGIN = 1.5
# Parts of a device's memory, so that what other processes take of it for a moment does not change the split.
_PARTS = 8


# Tokens that a forward pass on a CPU may have in more rows than are usual: of short rows, a pass more costs more than padding.
_SHORT = 1024


class Split(NamedTuple):
    """Rows of a micro-batch, and whether blocks are computed again in the backward pass."""

    rows: int
    recompute: bool

    def workload(self, work: Workload, batch: int) -> Workload:
        """A step of `batch` rows, split like this."""
        return replace(work, micro_batches=-(-batch // self.rows), micro_rows=self.rows, recompute=self.recompute)


def default_split(settings: TrainSettings, batch: int, device: torch.device, longest: int = 0) -> Split:
    """What is done where nothing is known of memory; on a CPU short rows, of `longest` tokens at most, go together."""
    again = settings.checkpoint_activations
    short = _SHORT // longest if longest and device.type == "cpu" else 0
    most = batch if settings.optimizer_mode == "fused" else max(MICRO_ROWS, short)
    rows = min(settings.micro_batch_size or most, batch)
    return Split(rows, device.type == "cuda" if again is None else again)


def candidates(settings: TrainSettings, batch: int, longest: int, device: torch.device) -> list[Split]:
    """Splits that the settings allow, the fastest first."""
    if device.type != "cuda":
        return [default_split(settings, batch, device, longest)]
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    if settings.micro_batch_size is not None or settings.optimizer_mode == "fused":
        sizes = [min(settings.micro_batch_size or batch, batch)]
    kept = [Split(rows, False) for rows in sizes if rows == sizes[0] or rows * longest >= _BUSY]
    again = [Split(rows, True) for rows in sizes]
    match settings.checkpoint_activations:
        case None:
            return kept + again
        case True:
            return again
        case False:
            return [Split(rows, False) for rows in sizes]


def choose_split(
    plans_of: Callable[[Split], Mapping[str, Footprint]],
    settings: TrainSettings,
    batch: int,
    longest: int,
    device: torch.device,
    memory: float | None = None,
) -> Split:
    """The fastest split with which the model stays on the device, or else with which the other ways of training fit.

    Args:
        plans_of: what each way of training takes, split like that.
        settings: with `offload`; what they give is kept.
        batch: rows of a step.
        longest: tokens of the longest row.
        device: where to compute.
        memory: of the device, in bytes; default what is free, in eighths of all.
    """
    found = candidates(settings, batch, longest, device)
    if len(found) == 1:
        return found[0]
    memory = _memory(device) if memory is None else memory
    tiers: tuple[Offload, ...] = ("none", "cpu", "bases", "disk") if settings.offload == "auto" else (settings.offload,)
    for tier in tiers:
        for split in found:
            if tier == "none" or split.recompute:  # streamed blocks are always computed again
                plan = plans_of(split).get(tier)
                if plan is None:  # not in several processes
                    continue
                activations = plan.device.get("activations", 0.0)
                if sum(plan.device.values()) + (_MARGIN - 1) * activations <= SHARE * memory:
                    return split
    return default_split(settings, batch, device)


def _memory(device: torch.device) -> float:
    total = torch.cuda.get_device_properties(device).total_memory
    free, _ = available_memory(device)
    return total * int(_PARTS * free / total) / _PARTS
