"""A checkpoint made ready for training: resident, or streamed from host memory or disk."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.staging import writing
from sculptor.errors import SettingsError
from sculptor.model.load import LoadedModel, checkpoint_activations, load_model, load_streamed
from sculptor.progress import Progress
from sculptor.tasks.train_output import TrainJob
from sculptor.training.protect import attach_coordinates, protected_blocks
from sculptor.training.settings import TrainSettings
from sculptor.training.streamed import StreamedUpdates
from sculptor.training.updates import ResidentUpdates, TrainedParameters, Updates


def prepare(job: TrainJob, device: torch.device, scratch: Path, progress: Progress) -> tuple[LoadedModel, Updates]:
    """The model with its protected matrices and what else is trained, as the settings' `offload` says.

    Args:
        job: opened and checked inputs; `offload` is resolved.
        device: where to compute.
        scratch: directory for what waits on disk; emptied.
        progress: makes progress bars.
    """
    with writing(scratch):
        shutil.rmtree(scratch, ignore_errors=True)
    if job.settings.offload == "none":
        return _prepare_resident(job, device)
    assert job.settings.offload != "auto"
    keep = None if job.settings.offload_inputs is None else not job.settings.offload_inputs
    loaded = load_streamed(
        job.checkpoint,
        device,
        job.settings.offload,
        job.architecture,
        scratch=scratch,
        trained=trained_dtypes(job.architecture, job.archive, device),
        resident=frozenset(job.extra),
        keep_inputs=keep,
        progress=progress,
    )
    return loaded, streamed_updates(loaded, job.archive, _open_extra(loaded, job), job.settings, progress)


def trained_dtypes(architecture: Architecture, archive: Archive, device: torch.device) -> dict[str, torch.dtype]:
    """Parameters that training changes, and what they are computed in."""
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    open_names = {name for name, record in archive.items() if record.staircase.num_free}
    return {target.parameter: compute for target in architecture.targets if target.name in open_names}


def streamed_updates(
    loaded: LoadedModel,
    archive: Archive,
    extra: Mapping[str, nn.Parameter],
    settings: TrainSettings,
    progress: Progress,
) -> StreamedUpdates:
    """The optimizer of a streamed model; if that fails, the model's memory is given back.

    Raises:
        SettingsError: if the host does not give enough memory.
    """
    assert loaded.stream is not None
    bar = progress(total=len(loaded.stream.paths), desc="prepare", unit="block")
    try:
        return StreamedUpdates(loaded.model, loaded.stream, archive, extra, settings, bar.update)
    except BaseException as cause:
        loaded.stream.close()
        if isinstance(cause, MemoryError):
            raise SettingsError(f"--offload {settings.offload}: {cause}; use --offload disk") from cause
        raise
    finally:
        bar.close()


def _prepare_resident(job: TrainJob, device: torch.device) -> tuple[LoadedModel, Updates]:
    loaded = load_model(job.checkpoint, device, job.architecture)
    on_gpu = device.type == "cuda"
    attach_coordinates(
        loaded.model,
        job.archive,
        compute_dtype=torch.bfloat16 if on_gpu else None,
        fold="manual",
        soften=job.settings.soften or 0.0,
    )
    extra = _open_extra(loaded, job)
    recompute = on_gpu if job.settings.checkpoint_activations is None else job.settings.checkpoint_activations
    if recompute:
        checkpoint_activations(loaded.model)
    parameters = TrainedParameters(tuple(protected_blocks(loaded.model)), extra)
    return loaded, ResidentUpdates(parameters, job.settings, device)


def _open_extra(loaded: LoadedModel, job: TrainJob) -> dict[str, nn.Parameter]:
    """Opens what else is trained, in float32."""
    extra: dict[str, nn.Parameter] = {}
    for parameter in job.extra:
        value = loaded.model.get_parameter(parameter)
        if not value.requires_grad:  # a tied one comes under several names and is trained once
            value.data = value.data.to(torch.float32)
            value.requires_grad_(True)
            extra[parameter] = value
    return extra
