"""`sculptor.stream`: a protected model larger than memory, for a training loop of one's own."""

import math
import tempfile
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sculptor import __version__
from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.configuration import check_attention
from sculptor.checkpoint.directory import check_modules
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.staging import check_apart, one_pass, write_json, writing
from sculptor.checkpoint.writer import edits_of, names_as_written, write_checkpoint
from sculptor.errors import SettingsError, TrainingError
from sculptor.jobs.job import resolve_settings
from sculptor.jobs.train_record import merge_of
from sculptor.methods.kinds import Kinds
from sculptor.model.load import load_streamed, resolve_device
from sculptor.planning.footprints import Workload, footprints
from sculptor.planning.placement import check_waiting, plan_archive
from sculptor.progress import Progress, silent
from sculptor.training.precision import compute_dtype
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.training.setup import streamed_updates, trained_dtypes
from sculptor.training.stepping.updates import merge_trained

_USED = {
    "offload", "learning_rate", "relative_rate", "weight_decay", "clip", "clip_by", "soften", "optimizer_mode", "optimizer_on",
    "offload_inputs", "device", "batch_size", "micro_batch_size", "attn_implementation",
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


def _rate_of(given: float | None) -> RateOf:
    """A given rate for everything, or each parameter's own peak."""
    return lambda peak: peak if given is None else given


class StreamedModel:
    """A transformers model of which one block at a time is on the device, and the optimizer of its free coordinates.

    A context manager: leaving it gives back host memory and files. `model` is called like any transformers model, and
    its loss goes to `backward`, since gradients appear and leave block by block.

    Args:
        model: a checkpoint directory or hub name.
        archive: its subspace archive, or its path.
        settings: `offload` (cpu or disk), `relative_rate` or `learning_rate`, `weight_decay`, `clip` (by default the norm
            is clipped at 1, as in `train`), `clip_by`, `soften`, `optimizer_mode`, `optimizer_on`, `offload_inputs`,
            `device`; what is the loop's own affair is refused. With `optimizer_mode="fused"` a step has one `backward`,
            and `batch_size` is given as `micro_batch_size` is.
        directory: for files, with `offload="disk"`; default the system's place for temporary ones.
        progress: makes progress bars.
        rules: kinds of rules beside sculptor's own.

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
        rules: Kinds | None = None,
    ) -> None:
        settings = settings or TrainSettings(offload="cpu")
        if settings.offload not in ("cpu", "disk"):
            raise SettingsError(
                f"--offload {settings.offload}: use cpu or disk; for a resident model, sculptor.protect"
            )
        _check(settings, directory)
        self.archive = archive if isinstance(archive, Archive) else Archive(archive, rules=rules)
        self.settings = resolve_settings(settings, self.archive)
        self.checkpoint = open_checkpoint(model, settings.attn_implementation)
        check_modules(self.checkpoint.path)
        check_attention(self.checkpoint)
        self.archive.check_base(self.checkpoint, progress)
        architecture = inspect_architecture(self.checkpoint)
        device = resolve_device(settings.device)
        matrices = plan_archive(self.archive, architecture)
        # What waits is known; what a batch takes is the loop's own affair.
        plan = footprints(self.checkpoint, architecture, matrices, device, Workload(tokens=1, micro_batches=1))
        check_waiting(plan[settings.offload], Path(directory or tempfile.gettempdir()))
        if directory is not None:
            with writing(Path(directory)):
                Path(directory).mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix="sculptor-", dir=directory)
        loaded = load_streamed(
            self.checkpoint,
            device,
            settings.offload,
            architecture,
            scratch=Path(self._scratch.name),
            compute_dtypes=trained_dtypes(architecture, self.archive, compute_dtype("auto", device)),
            keep_inputs=None if settings.offload_inputs is None else not settings.offload_inputs,
            progress=progress,
        )
        self.loaded, self.updates = streamed_updates(loaded, self.archive, {}, self.settings, progress)
        self.updates.begin(_rate_of(None))
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
            learning_rate: of the step, if it updates within the backward pass (`optimizer_mode="fused"`); default the
                settings'.
        """
        self._check_open()
        self.updates.begin(_rate_of(learning_rate))
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float | None = None) -> float:
        """Clips and updates; returns the norm of the gradient before.

        Args:
            learning_rate: the same for all matrices; default the settings', which may be relative to each matrix.

        Raises:
            TrainingError: if that is not finite; the step is not taken then, except within the backward pass (`fused`).
        """
        self._check_open()
        norm = self.updates.clip()
        if not math.isfinite(norm):
            raise TrainingError(
                f"gradient norm {norm}: not finite; lower learning_rate or look at the batch, and call zero_grad to skip it"
            )
        self.updates.step(_rate_of(learning_rate))
        return norm

    def zero_grad(self) -> None:
        """Forgets the gradients since the last step: of a batch that is to be skipped."""
        self._check_open()
        self.updates.forget()

    def save(self, output: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> None:
        """Writes the merged checkpoint, one matrix in memory.

        Raises:
            SculptorError: if it cannot be written.
        """
        self._check_open()
        output = Path(output).resolve()
        check_apart(output, [self.checkpoint.path, self.archive.path])
        with one_pass(output, command="stream", overwrite=overwrite) as staged:
            with closing(progress(total=self.checkpoint.num_bytes, desc="write", unit="B")) as bar:
                edits = edits_of(self.archive.values(), lambda record: self._merge(record.name))
                with self.archive.ahead(names_as_written(self.checkpoint, self.archive, None)):
                    write_checkpoint(self.checkpoint, staged, edits, bar=bar)
            previous = read_record(self.checkpoint.path)
            lineage = [*previous.lineage, merge_of(self.checkpoint, self.archive, None)]
            record = {"created_by": f"sculptor {__version__}", "command": "stream", "lineage": [*map(asdict, lineage)]}
            write_json(staged / RECORD_NAME, record | {"also_trained": list(previous.also_trained)})

    def _merge(self, name: str) -> Any:
        def merged(weight: Tensor) -> Tensor:
            made = merge_trained(self.updates, self.archive.read(name), weight, weight.dtype)
            return weight if made is None else made.tensor

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
    rules: Kinds | None = None,
) -> StreamedModel:
    """Opens a protected model larger than memory, for a loop of your own.

    Args:
        model: a checkpoint directory or hub name.
        archive: its subspace archive, or its path.
        settings: as `StreamedModel` takes them; default `TrainSettings(offload="cpu")`.
        directory: for files, with `offload="disk"`; default the system's place for temporary ones.
        progress: makes progress bars.
        rules: kinds of rules beside sculptor's own.

    Returns:
        A context manager, with `model`, `backward`, `step` and `save`.

    Raises:
        SculptorError: if an input cannot be used, or it does not fit into memory or disk.
    """
    return StreamedModel(model, archive, settings, directory=directory, progress=progress, rules=rules)
