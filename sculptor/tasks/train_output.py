"""What a training run leaves: the merged checkpoint, the updated archive, and the record of how they were made.

One pass over the checkpoint, one tensor in memory: a target is merged in float64, its leak measured on what will be
written, and its entry of the next archive added.
"""

import functools
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculptor import __version__
from sculptor.analysis.carry import accumulate, retake
from sculptor.analysis.factors import Source
from sculptor.analysis.settings import AnalyzeSettings
from sculptor.analysis.verify import measure_leak
from sculptor.analysis.weights import as_out_in, to_device
from sculptor.archive.manifest import Added, MatrixRecord, TaskRecord
from sculptor.archive.store import Archive, Subspaces
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, Merge, read_record
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tensors import digest
from sculptor.checkpoint.writer import output_dtype, write_checkpoint
from sculptor.data.examples import Encoded
from sculptor.model.load import LoadedModel, load_model, load_streamed
from sculptor.progress import Progress
from sculptor.tasks.memory import settle, spread_rows, write_factors
from sculptor.tasks.train_report import MatrixReport, TrainReport
from sculptor.training.loop import LoopResult
from sculptor.training.settings import TrainSettings
from sculptor.training.updates import Updates, merge_trained


@dataclass(frozen=True, eq=False, slots=True)
class TrainJob:
    """Opened and checked inputs of a run."""

    checkpoint: Checkpoint
    architecture: Architecture
    archive: Archive
    settings: TrainSettings
    data: tuple[str, ...]
    encoded: Encoded
    evaluation: Encoded | None
    name: str
    extra: Mapping[str, str]  # openly trained parameter -> tensor
    placement: str = ""  # where its blocks are, and why


def write_output(
    job: TrainJob,
    loaded: LoadedModel,
    updates: Updates,
    result: LoopResult,
    output: Path,
    partial: Path,
    progress: Progress,
) -> TrainReport:
    """Writes checkpoint, archive, metrics and record of a finished loop into `partial / "output"`.

    Raises:
        OutputError: if a file cannot be written.
        TrainingError: if merged values do not fit the dtype they are saved in.
    """
    updates.settle()
    staged = partial / "output"
    shutil.rmtree(staged, ignore_errors=True)
    with writing(staged):
        (staged / "subspaces").mkdir(parents=True)
    dtype = getattr(torch, job.archive.manifest.settings.get("dtype", "float32"))
    with closing(ArchiveWriter(staged / "subspaces", dtype, {})) as writer:
        report = _write(job, loaded, updates, result, output, staged, writer, progress)
    with writing(staged):
        shutil.copyfile(partial / "metrics.jsonl", staged / "metrics.jsonl")
    return report


def cast_to(settings: TrainSettings) -> torch.dtype | None:
    """Dtype of every tensor of the merged checkpoint; None if each keeps its own."""
    return None if settings.save_dtype == "keep" else getattr(torch, settings.save_dtype)


def _write(
    job: TrainJob,
    loaded: LoadedModel,
    updates: Updates,
    result: LoopResult,
    output: Path,
    staged: Path,
    writer: ArchiveWriter,
    progress: Progress,
) -> TrainReport:
    saved = cast_to(job.settings)
    num_trainable = updates.num_trainable
    previous = read_record(job.checkpoint.path)
    matrices = _MatrixWriter(job, updates, loaded.device, writer, saved, len(job.archive.manifest.tasks))
    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        name: functools.partial(matrices.write, name) for name in job.archive
    }
    opened = _files_of(loaded, job.architecture, updates.extra)
    for name, value in opened.items():
        replacements[name] = functools.partial(_cast_like, value, saved)
    bar = progress(total=job.checkpoint.num_bytes, desc="write", unit="B")
    write_checkpoint(job.checkpoint, staged, replacements, dtype=saved, bar=bar)
    bar.close()
    if matrices.waiting:
        _remember(job, loaded, updates, staged, writer, matrices, progress)
    also_trained = tuple(sorted({*previous.also_trained, *opened}))
    report = TrainReport(
        output=output,
        loop=result,
        placement=job.placement,
        num_examples=len(job.encoded.examples),
        num_dropped=job.encoded.num_dropped,
        num_cut=job.encoded.num_cut,
        num_trainable=num_trainable,
        carry=matrices.carry or "",
        num_protected=sum(record.staircase.num_frozen for record in job.archive.values()),
        also_trained=also_trained,
        not_targeted=job.archive.manifest.not_targeted,
        matrices={name: matrices.reports[name] for name in job.archive},
    )
    task = TaskRecord(
        job.name,
        "training",
        {
            "data": list(job.data),
            "rows": report.num_examples,
            "steps": result.steps,
            "carry": matrices.carry,
            "learning_rate": job.settings.learning_rate,
        }
        | ({"weights": [job.settings.memory_weight]} if matrices.carry == "merge" else {}),
    )
    writer.finish(
        replace(job.archive.manifest, created_by=f"sculptor {__version__}", tasks=(*job.archive.manifest.tasks, task))
    )
    write_json(staged / RECORD_NAME, _output_record(job, report, previous.lineage, saved))
    return report


def _remember(
    job: TrainJob,
    loaded: LoadedModel,
    updates: Updates,
    staged: Path,
    writer: ArchiveWriter,
    matrices: "_MatrixWriter",
    progress: Progress,
) -> None:
    """Adds the moments of the finished task to those of the archive, from a few hundred of its rows."""
    records = matrices.waiting
    # Of what was written, rounding and all: the archive belongs to that, however the model was trained.
    merged, stream, device = open_checkpoint(staged), loaded.stream, loaded.device
    updates.close()
    if stream is not None:
        loaded = load_streamed(merged, device, stream.weights.scratch.tier, progress=progress)
    else:
        for value in (*loaded.model.parameters(), *loaded.model.buffers()):
            value.data = value.data.new_empty(0)  # the moments need the room
        if device.type == "cuda":
            torch.cuda.empty_cache()
        loaded = load_model(merged, device)
    settings = AnalyzeSettings.from_json(job.archive.manifest.settings)
    targets = [target for target in job.architecture.targets if target.name in records]
    assert job.settings.memory_rows is not None
    assert job.settings.memory_weight is not None
    chosen = spread_rows(job.encoded.examples, job.settings.memory_rows)
    source = Source(job.name, chosen, job.settings.memory_weight)
    with closing(loaded):
        write_factors(loaded, list(records.values()), targets, [source], settings, writer, job.archive, progress)
    settle(writer, settings, [*job.archive.manifest.source_weights, source.weight])
    for name in records:
        frozen = writer.record(name).staircase.num_free == 0
        matrices.reports[name] = replace(matrices.reports[name], frozen=frozen)


def _files_of(
    loaded: LoadedModel, architecture: Architecture, extra: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Tensor of the checkpoint -> openly trained parameter; a tied one may stand in the files under several names."""
    trained = {id(value): value for value in extra.values()}
    known = dict(loaded.model.named_parameters(remove_duplicate=False))
    return {
        name: trained[id(known[parameter])]
        for parameter, name in architecture.tensors.items()
        if parameter in known and id(known[parameter]) in trained
    }


def _cast_like(value: Tensor, saved: torch.dtype | None, tensor: Tensor) -> Tensor:
    """An openly trained parameter in the dtype that the base's `tensor` is written in."""
    return value.detach().cpu().to(output_dtype(tensor.dtype, saved))


class _MatrixWriter:
    """Merges one matrix at a time: makes the tensor to write, its archive entry and its figures."""

    def __init__(
        self,
        job: TrainJob,
        updates: Updates,
        device: torch.device,
        writer: ArchiveWriter,
        saved: torch.dtype | None,
        task: int,
    ) -> None:
        self.job = job
        self.updates = updates
        self.device = device
        self.writer = writer
        self.saved = saved
        self.task = task
        self.carry = job.settings.carry
        self.waiting: dict[str, MatrixRecord] = {}  # records whose moments are still to be measured
        self.reports: dict[str, MatrixReport] = {}

    def write(self, name: str, weight: Tensor) -> Tensor:
        """The merged tensor, given the base's as stored."""
        dtype = output_dtype(weight.dtype, self.saved)
        subspaces = self.job.archive.read(name)
        made = merge_trained(self.updates, self.job.archive, subspaces, weight, dtype, self.device)
        merged, update = made or (weight.to(dtype), torch.zeros(subspaces.record.shape, dtype=torch.float64))
        self._carry(subspaces, merged, update)
        record = self.waiting.get(name) or self.writer.record(name)
        measured = measure_leak(weight, merged, subspaces, self.device)
        stored = as_out_in(update, subspaces.record.transposed)
        norm = float(update.norm())
        lost = float((merged.to(torch.float64) - weight.to(torch.float64) - stored.cpu()).norm())
        self.reports[name] = MatrixReport(
            role=record.role,
            update=measured.update / (float(weight.to(torch.float64).norm()) or 1.0),
            leak=measured.frozen / measured.update if measured.update else 0.0,
            update_norm=norm,
            rounding_loss=lost / norm if norm else 0.0,
            outputs_added=record.added[-1].outputs if record.added[-1].task == self.task else 0,
            inputs_added=record.added[-1].inputs if record.added[-1].task == self.task else 0,
            frozen=record.staircase.num_free == 0,
        )
        return merged

    def _carry(self, subspaces: Subspaces, merged: Tensor, update: Tensor) -> None:
        record = subspaces.record
        record = replace(record, base_digest=digest(merged), base_dtype=str(merged.dtype).removeprefix("torch."))
        if self.carry == "merge":  # its moments follow when all matrices are merged
            self.waiting[record.name] = record
            return
        constraint: Any = self.job.archive.manifest.constraint
        spectrum = self.job.archive.spectrum(record.name)
        if self.carry == "retake":
            found = retake(record, to_device(merged, record.transposed, self.device), constraint)
            # Decomposed anew: no direction is any task's own any more.
            record = replace(record, steps=found.staircase.steps, energy=found.energy, added=record.added[:1])
            self.writer.add(record, found.output, found.input, found.spectrum)
            return
        carried = accumulate(
            Subspaces(
                record,
                subspaces.output and subspaces.output.to(update.device, subspaces.output.vectors.dtype),
                subspaces.input and subspaces.input.to(update.device, subspaces.input.vectors.dtype),
            ),
            update,
            constraint,
        )
        added = record.added
        if carried.outputs_added or carried.inputs_added:
            added = (*added, Added(self.task, carried.outputs_added, carried.inputs_added))
        record = replace(record, steps=carried.staircase.steps, added=added)
        self.writer.add(record, carried.output, carried.input, spectrum)


def _output_record(
    job: TrainJob, report: TrainReport, lineage: tuple[Merge, ...], saved: torch.dtype | None
) -> dict[str, Any]:
    """sculptor.json: how the output came about."""
    import accelerate
    import safetensors
    import transformers

    merge = Merge(
        base_digests={name: record.base_digest for name, record in job.archive.items()},
        dtypes={
            name: str(output_dtype(job.checkpoint.infos[name].dtype, saved)).removeprefix("torch.")
            for name in job.archive
        },
    )
    return {
        "created_by": f"sculptor {__version__}",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "safetensors": safetensors.__version__,
        },
        "command": "train",
        "settings": asdict(job.settings),
        "data": list(job.data),
        "base": str(job.checkpoint.path),
        "lineage": [*map(asdict, lineage), asdict(merge)],
        "also_trained": list(report.also_trained),
        "not_targeted": [dict(item) for item in report.not_targeted],
        "frozen": list(report.frozen),
        "examples": {"rows": report.num_examples, "dropped": report.num_dropped, "cut": report.num_cut},
        "num_trainable": report.num_trainable,
        "result": asdict(report.loop),
        "matrices": {name: asdict(matrix) for name, matrix in report.matrices.items()},
    }
