"""A checkpoint made ready for training: resident, or streamed from host memory, disk or the device itself."""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.vocabulary import Growth
from sculptor.checkpoint.written import remove
from sculptor.errors import SettingsError
from sculptor.model.load import LoadedModel, checkpoint_activations, load_model, load_streamed
from sculptor.progress import Progress
from sculptor.streaming.build import Divide
from sculptor.streaming.owners import Owners, choose_owners
from sculptor.streaming.regions import Tier
from sculptor.training.precision import compute_dtype
from sculptor.training.protect import attach_coordinates, protected_blocks
from sculptor.training.rates import Peaks, peak_rates
from sculptor.training.rows import NewRows, open_rows
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.optimizer import kept_bytes
from sculptor.training.stepping.prepare import held_bytes
from sculptor.training.stepping.resident import ResidentUpdates, TrainedParameters
from sculptor.training.stepping.streamed import StreamedUpdates
from sculptor.training.stepping.updates import Updates
from sculptor.world import here


def prepare_model(
    checkpoint: Checkpoint,
    architecture: Architecture,
    archive: Archive,
    settings: TrainSettings,
    extra: Sequence[str],
    device: torch.device,
    scratch: Path,
    progress: Progress,
    growth: Growth | None = None,
) -> tuple[LoadedModel, Updates]:
    """The model with its protected matrices and what else is trained, as the settings' `offload` and `parallel` say.

    Args:
        checkpoint: where the weights are, `architecture` of it.
        archive: bound to it.
        settings: resolved; `offload` is not auto.
        extra: openly trained parameters.
        device: where to compute.
        scratch: directory for what waits on disk; emptied.
        progress: makes progress bars.
        growth: new tokens of the checkpoint, whose rows are trained too.
    """
    remove(scratch)
    divided = settings.parallel == "shard"
    if settings.offload == "none" and not divided:
        return _prepare_resident(checkpoint, architecture, archive, settings, extra, device, growth, progress)
    tier: Tier = settings.offload if settings.offload in ("cpu", "disk") else "device"
    keep = (
        (True if settings.offload == "none" else None)
        if settings.offload_inputs is None
        else not settings.offload_inputs
    )
    loaded = load_streamed(
        checkpoint,
        device,
        tier,
        architecture,
        scratch=scratch,
        compute_dtypes=trained_dtypes(architecture, archive, compute_dtype(settings.precision, device)),
        resident=frozenset(extra),
        keep_inputs=keep,
        progress=progress,
        divide=_divide(checkpoint, architecture, archive, device, kept_bytes(settings)) if divided else None,
        constants="cpu" if settings.offload == "bases" else None,
    )
    opened = _open_extra(loaded, extra)
    return streamed_updates(loaded, archive, opened, settings, progress, open_rows(loaded.model, growth))


def _divide(
    checkpoint: Checkpoint, architecture: Architecture, archive: Archive, device: torch.device, kept: int
) -> Divide:
    """Owners among all processes, so that each holds about as much as the others; `kept` are bytes of a number's moments."""
    open_names = set(archive.open_names)
    beside: dict[str, float] = defaultdict(float)
    for target in architecture.targets:
        if target.name in open_names:
            record, size = archive[target.name], checkpoint.info_of(target).num_bytes
            beside[target.parameter] += held_bytes(record.rule, record.tensors, size, device.type, kept)
    world = here()

    def divide(blocks: Sequence[Mapping[str, int]]) -> Owners:
        held = [{name: size + beside[name] for name, size in block.items()} for block in blocks]
        return Owners(world, choose_owners(held, world.size))

    return divide


def trained_dtypes(architecture: Architecture, archive: Archive, compute: torch.dtype) -> dict[str, torch.dtype]:
    """Parameters that training changes, and what they are computed in."""
    open_names = set(archive.open_names)
    return {target.parameter: compute for target in architecture.targets if target.name in open_names}


def streamed_updates(
    loaded: LoadedModel,
    archive: Archive,
    extra: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    progress: Progress,
    rows: Sequence[NewRows] = (),
) -> tuple[LoadedModel, StreamedUpdates]:
    """A streamed model as it trains, and its optimizer; if that fails, the model's memory is given back.

    Raises:
        SettingsError: if the host does not give enough memory.
    """
    assert loaded.stream is not None
    peaks = _peaks(settings, archive, extra, rows)
    extra = {**extra, **{new.name: new.values for new in rows}}
    try:
        with closing(progress(total=len(loaded.stream.paths), desc="prepare", unit="block")) as bar:
            updates = StreamedUpdates(loaded.model, loaded.stream, archive, extra, peaks, settings, bar.update)
        return replace(loaded, stream=updates.stream), updates
    except BaseException as cause:
        loaded.stream.close()
        if isinstance(cause, MemoryError):
            raise SettingsError(f"--offload {settings.offload}: {cause}; use --offload disk") from cause
        raise


def _prepare_resident(
    checkpoint: Checkpoint,
    architecture: Architecture,
    archive: Archive,
    settings: TrainSettings,
    extra: Sequence[str],
    device: torch.device,
    growth: Growth | None,
    progress: Progress,
) -> tuple[LoadedModel, Updates]:
    loaded = load_model(checkpoint, device, architecture)
    on_gpu = device.type == "cuda"
    dtype = compute_dtype(settings.precision, device)
    with closing(progress(total=len(archive.open_names), desc="prepare", unit="matrix")) as bar:
        soften = settings.soften or 0.0
        attach_coordinates(
            loaded.model,
            archive,
            compute_dtype=dtype,
            fold="manual",
            soften=soften,
            done=functools.partial(bar.update, 1),
        )
    opened = _open_extra(loaded, extra)
    rows = open_rows(loaded.model, growth)
    recompute = on_gpu if settings.checkpoint_activations is None else settings.checkpoint_activations
    if recompute:
        checkpoint_activations(loaded.model)
    every = {**opened, **{new.name: new.values for new in rows}}
    parameters = TrainedParameters(tuple(protected_blocks(loaded.model)), every)
    peaks = _peaks(settings, archive, opened, rows)
    return loaded, ResidentUpdates(parameters, peaks, settings, device, here())


def _peaks(
    settings: TrainSettings, archive: Archive, extra: Mapping[str, nn.Parameter], rows: Sequence[NewRows]
) -> Peaks:
    """Peak rates; that of new rows follows the size of the whole, since they start as a mean, which is small."""
    return peak_rates(settings, archive, {**extra, **{new.name: new.whole for new in rows}})


def _open_extra(loaded: LoadedModel, extra: Sequence[str]) -> dict[str, nn.Parameter]:
    """Opens what else is trained, in float32."""
    opened: dict[str, nn.Parameter] = {}
    for parameter in extra:
        value = loaded.model.get_parameter(parameter)
        if not value.requires_grad:  # a tied one comes under several names and is trained once
            value.data = value.data.to(torch.float32)
            value.requires_grad_(True)
            opened[parameter] = value
    return opened
