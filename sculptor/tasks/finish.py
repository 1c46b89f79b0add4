"""What a training run leaves: the merged checkpoint, the updated archive, and the record of how they were made.

One pass over the checkpoint, one matrix in memory: a target is merged in float64, its leak measured on what will be
written, and its entry of the next archive added. Rules that go on by what a task's rows measure follow in a second pass.
"""

import functools
import shutil
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sculptor import __version__
from sculptor.analysis.derive import decide, write_measured
from sculptor.analysis.evidence import Source
from sculptor.analysis.sources import spread_rows
from sculptor.analysis.verify import measure_leak
from sculptor.archive.manifest import MatrixRecord, TaskRecord
from sculptor.archive.store import Entry
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.orientation import as_out_in, to_device
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tensors import digest
from sculptor.checkpoint.writer import Edit, output_dtype, write_checkpoint
from sculptor.edits.merge import Merged
from sculptor.methods.method import Carrying, Evidence, carries_of, measures_of
from sculptor.methods.rule import is_open
from sculptor.model.load import LoadedModel, load_model, load_streamed
from sculptor.numerics.rounding import rms
from sculptor.progress import Progress
from sculptor.tasks.job import TrainJob, cast_to
from sculptor.tasks.train_record import training_record
from sculptor.tasks.train_report import MatrixReport, TrainReport
from sculptor.training.loop import LoopResult
from sculptor.training.stepping.updates import Updates, merge_trained


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
    updates.release_model()
    staged = partial / "output"
    shutil.rmtree(staged, ignore_errors=True)
    with writing(staged):
        (staged / "subspaces").mkdir(parents=True)
    dtype = getattr(torch, job.archive.manifest.settings.dtype)
    with closing(ArchiveWriter(staged / "subspaces", dtype, {}, job.archive.kinds)) as writer:
        report = _Finish(job, loaded, updates, staged, writer, progress).run(result, output)
    with writing(staged):
        shutil.copyfile(partial / "metrics.jsonl", staged / "metrics.jsonl")
    return report


@dataclass(eq=False)
class _Finish:
    """One output on its way: merges one matrix at a time, makes its archive entry and its figures."""

    job: TrainJob
    loaded: LoadedModel
    updates: Updates
    staged: Path
    writer: ArchiveWriter
    progress: Progress

    def __post_init__(self) -> None:
        self.device = self.loaded.device
        self.saved = cast_to(self.job.settings)
        self.method = self.job.archive.method
        self.carry = self.job.settings.carry or carries_of(self.method)[0]
        self.measures = measures_of(self.method, "carry", self.carry)
        self.task = len(self.job.archive.manifest.tasks)
        self.waiting: dict[str, MatrixRecord] = {}  # records whose rules wait for what is to be measured
        self.reports: dict[str, MatrixReport] = {}

    def run(self, result: LoopResult, output: Path) -> TrainReport:
        """Writes everything but the metrics."""
        job, num_trainable = self.job, self.updates.num_trainable
        opened = _files_of(self.loaded, job.architecture, self.updates.extra)
        bar = self.progress(total=job.checkpoint.num_bytes, desc="write", unit="B")
        write_checkpoint(job.checkpoint, self.staged, self._edits(opened), dtype=self.saved, bar=bar)
        bar.close()
        if self.waiting:
            self._measure()
        previous = read_record(job.checkpoint.path)
        report = TrainReport(
            output=output,
            loop=result,
            placement=job.placement,
            num_examples=len(job.encoded.examples),
            num_dropped=job.encoded.num_dropped,
            num_cut=job.encoded.num_cut,
            num_trainable=num_trainable,
            num_protected=sum(record.shape[0] * record.shape[1] for record in job.archive.values())
            - job.archive.num_free,
            carry=self.carry,
            also_trained=tuple(sorted({*previous.also_trained, *opened})),
            not_targeted=job.archive.manifest.not_targeted,
            learning_rate=job.settings.learning_rate,
            relative_rate=job.settings.relative_rate,
            matrices={name: self.reports[name] for name in job.archive},
        )
        self._finish_archive(report)
        write_json(self.staged / RECORD_NAME, training_record(job, report, previous.lineage, self.saved))
        return report

    def _edits(self, opened: Mapping[str, nn.Parameter]) -> dict[str, Edit | Mapping[int, Edit]]:
        """What makes the new tensors: merged matrices, and openly trained parameters."""
        edits: dict[str, Edit | Mapping[int, Edit]] = {
            name: functools.partial(_cast_like, value, self.saved) for name, value in opened.items()
        }
        parts: dict[str, dict[int, Edit]] = defaultdict(dict)
        for name, record in self.job.archive.items():
            edit = functools.partial(self._write, name)
            if record.part is None:
                edits[record.tensor] = edit
            else:
                parts[record.tensor][record.part] = edit
        return {**edits, **parts}

    def _write(self, name: str, weight: Tensor) -> Tensor:
        """The merged matrix, given the base's as stored."""
        dtype = output_dtype(weight.dtype, self.saved)
        entry = self.job.archive.read(name)
        merged = merge_trained(self.updates, self.job.archive, name, weight, dtype)
        if merged is None:
            merged = Merged(weight.to(dtype), torch.zeros(entry.rule.shape, dtype=torch.float64))
        self._carry(entry, merged)
        self.reports[name] = self._report(entry, weight, merged)
        return merged.tensor

    def _carry(self, entry: Entry, merged: Merged) -> None:
        record = replace(
            entry.record,
            base_digest=digest(merged.tensor),
            base_dtype=str(merged.tensor.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            base_rms=rms(merged.tensor),
        )
        if not isinstance(self.method, Carrying) or self.carry == "keep":
            self.writer.keep(record, self.job.archive)
            return
        if self.measures != "nothing":
            self.waiting[record.name] = record
            return
        evidence = Evidence(
            name=record.name,
            shape=record.shape,
            weight=lambda: to_device(merged.tensor, record.transposed, self.device),
            update=merged.update,
            task=self.task,
        )
        self.writer.add(record, self.method.carry(self.carry, entry, evidence))

    def _report(self, entry: Entry, weight: Tensor, merged: Merged) -> MatrixReport:
        name = entry.record.name
        record = self.waiting.get(name) or self.writer.record(name)
        measured = measure_leak(weight, merged.tensor, entry, self.device)
        stored = as_out_in(merged.update, record.transposed).cpu()
        norm = float(merged.update.norm())
        lost = float((merged.tensor.to(torch.float64) - weight.to(torch.float64) - stored).norm())
        outputs, inputs = record.rule.figures().added.get(self.task, (0, 0))
        return MatrixReport(
            role=record.role,
            update=measured.update / (float(weight.to(torch.float64).norm()) or 1.0),
            leak=measured.violation.norm / measured.update if measured.update else 0.0,
            rounding=measured.violation.rounding / measured.update if measured.update else 0.0,
            update_norm=norm,
            rounding_loss=lost / norm if norm else 0.0,
            outputs_added=outputs,
            inputs_added=inputs,
            frozen=not is_open(record.rule),
        )

    def _measure(self) -> None:
        """Carries rules on by the moments of the finished task, from a few hundred of its rows."""
        job, archive, method = self.job, self.job.archive, self.method
        assert isinstance(method, Carrying)
        loaded = self._reload()
        targets = [target for target in job.architecture.targets if target.name in self.waiting]
        assert job.settings.memory_rows is not None
        assert job.settings.memory_weight is not None
        chosen = spread_rows(job.encoded.examples, job.settings.memory_rows)
        source = Source(job.name, chosen, job.settings.memory_weight)
        with closing(loaded):
            write_measured(
                loaded,
                self.waiting,
                targets,
                [source],
                self.measures,
                archive.manifest.settings,
                lambda evidence: method.carry(self.carry, archive.read(evidence.name), evidence),
                self.writer,
                self.progress,
                self.task,
            )
        decide(self.writer, self.method, [*archive.manifest.source_weights, source.weight])
        for name in self.waiting:
            frozen = not is_open(self.writer.record(name).rule)
            self.reports[name] = replace(self.reports[name], frozen=frozen)

    def _reload(self) -> LoadedModel:
        """What was written, rounding and all: the archive belongs to that, however the model was trained."""
        merged, stream = open_checkpoint(self.staged), self.loaded.stream
        self.updates.close()
        if stream is not None:
            return load_streamed(merged, self.device, stream.weights.scratch.tier, progress=self.progress)
        for value in (*self.loaded.model.parameters(), *self.loaded.model.buffers()):
            value.data = value.data.new_empty(0)  # the moments need the room
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return load_model(merged, self.device)

    def _finish_archive(self, report: TrainReport) -> None:
        job, manifest = self.job, self.job.archive.manifest
        task = TaskRecord(
            job.name,
            "training",
            weights=(job.settings.memory_weight or 1.0,) if self.waiting else (),
            details={
                "data": [Path(file).name for file in job.data],
                "rows": report.num_examples,
                "steps": report.loop.steps,
                "carry": self.carry,
                "learning_rate": job.settings.learning_rate,
                "relative_rate": job.settings.relative_rate,
            },
        )
        self.writer.finish(replace(manifest, created_by=f"sculptor {__version__}", tasks=(*manifest.tasks, task)))


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
