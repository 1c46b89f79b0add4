"""`sculptor.stream`: a protected model larger than memory, for a training loop of one's own."""

import math
import tempfile
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.staging import check_apart, commit, staging, writing
from sculptor.checkpoint.writer import write_checkpoint
from sculptor.errors import SettingsError, TrainingError
from sculptor.model.load import load_streamed, resolve_device
from sculptor.progress import Progress, silent
from sculptor.tasks.placement import archive_shapes, check_waiting
from sculptor.tasks.train import resolve_settings
from sculptor.tasks.train_setup import streamed_updates, trained_dtypes
from sculptor.training.footprint import Workload, footprints
from sculptor.training.settings import TrainSettings
from sculptor.training.updates import merge_trained

_USED = {
    "offload", "learning_rate", "weight_decay", "clip", "clip_by", "soften", "optimizer_mode", "optimizer_on",
    "offload_inputs", "device", "batch_size", "micro_batch_size",
}  # fmt: skip


def _check(settings: TrainSettings, directory: str | Path | None) -> None:
    """Refuses what would have no effect."""
    idle = [
        field.name
        for field in fields(settings)
        if field.name not in _USED and getattr(settings, field.name) != field.default
    ]
    if directory is not None and settings.offload == "cpu":
        idle.append("directory")
    if idle:
        raise SettingsError(
            f"without effect in a loop of your own with offload={settings.offload!r}: {', '.join(idle)}"
        )


class StreamedModel:
    """A transformers model of which one block at a time is on the device, and the optimizer of its free coordinates.

    A context manager: leaving it gives back host memory and files. `model` is called like any transformers model, and
    its loss goes to `backward`, since gradients appear and leave block by block.

    Args:
        model: a checkpoint directory or hub name.
        archive: its subspace archive, or its path.
        settings: `offload` (cpu or disk), `learning_rate`, `weight_decay`, `clip` (by default the norm is clipped at 1, as in
            `train`), `clip_by`, `soften`, `optimizer_mode`, `optimizer_on`, `offload_inputs`, `device`; what is the loop's own
            affair is refused. With `optimizer_mode="fused"` a step has one `backward`, and `batch_size` is given as
            `micro_batch_size` is.
        directory: for files, with `offload="disk"`; default the system's place for temporary ones.
        progress: makes progress bars.

    Raises:
        SculptorError: if an input cannot be used, or it does not fit into memory or disk.
    """

    def __init__(
        self,
        model: str | Path,
        archive: str | Path | Archive,
        settings: TrainSettings | None = None,
        *,
        directory: str | Path | None = None,
        progress: Progress = silent,
    ) -> None:
        settings = settings or TrainSettings(offload="cpu")
        if settings.offload not in ("cpu", "disk"):
            raise SettingsError(
                f"--offload {settings.offload}: use cpu or disk; for a resident model, sculptor.protect"
            )
        _check(settings, directory)
        self.archive = archive if isinstance(archive, Archive) else Archive(archive)
        self.settings = resolve_settings(settings, self.archive)
        self.checkpoint = open_checkpoint(model)
        self.archive.check_base(self.checkpoint, progress)
        architecture = inspect_architecture(self.checkpoint)
        device = resolve_device(settings.device)
        shapes = archive_shapes(self.archive, architecture)
        # What waits is known; what a batch takes is the loop's own affair.
        plan = footprints(self.checkpoint, architecture, shapes, device, Workload(tokens=1, micro_batches=1))
        check_waiting(plan[settings.offload], Path(directory or tempfile.gettempdir()))
        if directory is not None:
            with writing(Path(directory)):
                Path(directory).mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix="sculptor-", dir=directory)
        self.loaded = load_streamed(
            self.checkpoint,
            device,
            settings.offload,
            architecture,
            scratch=Path(self._scratch.name),
            trained=trained_dtypes(architecture, self.archive, device),
            keep_inputs=None if settings.offload_inputs is None else not settings.offload_inputs,
            progress=progress,
        )
        self.updates = streamed_updates(self.loaded, self.archive, {}, self.settings, progress)
        assert self.settings.learning_rate is not None
        self.updates.begin(self.settings.learning_rate)
        self._open = True

    @property
    def model(self) -> Any:
        """The transformers model; train it under `torch.autocast("cuda", torch.bfloat16)` on a GPU."""
        self._check_open()
        return self.loaded.model

    def _check_open(self) -> None:
        if not self._open:
            raise SettingsError(f"the stream of {self.checkpoint.path} is closed; use it inside its with block")

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.loaded.device

    def backward(self, loss: Tensor, *, learning_rate: float | None = None) -> None:
        """Adds the gradients of a loss to those of the step; `loss.backward()` does too.

        Args:
            loss: of a micro-batch.
            learning_rate: of the step, if it updates within the backward pass (`optimizer_mode="fused"`).
        """
        self._check_open()
        assert self.settings.learning_rate is not None
        self.updates.begin(self.settings.learning_rate if learning_rate is None else learning_rate)
        loss.backward()  # type: ignore[no-untyped-call]
        self.updates.end_backward()

    def step(self, learning_rate: float | None = None) -> float:
        """Clips and updates; returns the norm of the gradient before.

        Raises:
            TrainingError: if that is not finite; the step is not taken then, except within the backward pass (`fused`).
        """
        self._check_open()
        assert self.settings.learning_rate is not None
        norm = self.updates.clip()
        if not math.isfinite(norm):
            raise TrainingError(f"gradient norm {norm}: not finite; lower learning_rate or look at the batch")
        self.updates.step(self.settings.learning_rate if learning_rate is None else learning_rate)
        return norm

    def save(self, output: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> None:
        """Writes the merged checkpoint, one matrix in memory.

        Raises:
            SculptorError: if it cannot be written.
        """
        self._check_open()
        output = Path(output).resolve()
        check_apart(output, [self.checkpoint.path, self.archive.path])
        with staging(output, overwrite=overwrite, resume=False, worth_keeping=lambda _: False) as partial:
            bar = progress(total=self.checkpoint.num_bytes, desc="write", unit="B")
            edits = {name: self._merge(name) for name in self.archive}
            write_checkpoint(self.checkpoint, partial, edits, bar=bar)
            bar.close()
            commit(partial, output)

    def _merge(self, name: str) -> Any:
        def merged(weight: Tensor) -> Tensor:
            found = self.archive.read(name)
            made = merge_trained(self.updates, self.archive, found, weight, weight.dtype, self.device)
            return weight if made is None else made[0]

        return merged

    def close(self) -> None:
        """Gives back host memory and files; the model cannot be used any more."""
        self._open = False
        self.updates.close()
        self._scratch.cleanup()

    def __enter__(self) -> "StreamedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream(
    model: str | Path,
    archive: str | Path | Archive,
    settings: TrainSettings | None = None,
    *,
    directory: str | Path | None = None,
    progress: Progress = silent,
) -> StreamedModel:
    """A protected model larger than memory, for a loop of your own; see `StreamedModel`."""
    return StreamedModel(model, archive, settings, directory=directory, progress=progress)
