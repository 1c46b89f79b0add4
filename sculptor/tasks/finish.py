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
from typing import TypedDict

import torch
from torch import Tensor, nn

from sculptor.analysis.verify import measure_leak
from sculptor.archive.store import Entry
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.orientation import as_out_in
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.writer import Edit, output_dtype, write_checkpoint
from sculptor.edits.merge import Merged
from sculptor.methods.rule import is_open, num_free
from sculptor.model.load import LoadedModel, load_model, load_streamed
from sculptor.progress import Progress
from sculptor.tasks.job import TrainJob, cast_to
from sculptor.tasks.next_archive import NextArchive
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
    with closing(NextArchive(job, staged / "subspaces", loaded.device)) as archive:
        report = _Finish(job, loaded, updates, staged, archive, progress).run(result, output)
    with writing(staged):
        shutil.copyfile(partial / "metrics.jsonl", staged / "metrics.jsonl")
    return report


class _Carried(TypedDict):
    """Fields of a matrix's report."""

    outputs_added: int
    inputs_added: int
    num_free_next: int
    frozen: bool


@dataclass(eq=False)
class _Finish:
    """One output on its way: merges one matrix at a time, and makes its figures."""

    job: TrainJob
    loaded: LoadedModel
    updates: Updates
    staged: Path
    archive: NextArchive
    progress: Progress

    def __post_init__(self) -> None:
        self.device = self.loaded.device
        self.saved = cast_to(self.job.settings)
        self.reports: dict[str, MatrixReport] = {}

    def run(self, result: LoopResult, output: Path) -> TrainReport:
        """Writes everything but the metrics."""
        job, num_trainable = self.job, self.updates.num_trainable
        opened = _files_of(self.loaded, job.architecture, self.updates.extra)
        bar = self.progress(total=job.checkpoint.num_bytes, desc="write", unit="B")
        write_checkpoint(job.checkpoint, self.staged, self._edits(opened), dtype=self.saved, bar=bar)
        bar.close()
        if self.archive.waiting:
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
            carry=self.archive.carry,
            also_trained=tuple(sorted({*previous.also_trained, *opened})),
            opened=tuple(sorted(opened)),
            not_targeted=job.archive.manifest.not_targeted,
            learning_rate=job.settings.learning_rate,
            relative_rate=job.settings.relative_rate,
            scaled=job.archive.method.defaults.scaled,
            matrices={name: self.reports[name] for name in job.archive},
        )
        self.archive.finish(report.num_examples, result.steps, report.opened)
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
        self.archive.add(entry, merged)
        self.reports[name] = self._report(entry, weight, merged)
        return merged.tensor

    def _report(self, entry: Entry, weight: Tensor, merged: Merged) -> MatrixReport:
        record = self.archive.record(entry.record.name)
        measured = measure_leak(weight, merged.tensor, entry, self.device)
        stored = as_out_in(merged.update, record.transposed).cpu()
        norm = float(merged.update.norm())
        lost = float((merged.tensor.to(torch.float64) - weight.to(torch.float64) - stored).norm())
        return MatrixReport(
            role=record.role,
            update=measured.update / (float(weight.to(torch.float64).norm()) or 1.0),
            leak=measured.violation.norm / measured.update if measured.update else 0.0,
            rounding=measured.violation.rounding / measured.update if measured.update else 0.0,
            update_norm=norm,
            rounding_loss=lost / norm if norm else 0.0,
            **self._carried(record.name),
        )

    def _carried(self, name: str) -> _Carried:
        """What the next archive makes of a matrix."""
        rule = self.archive.record(name).rule
        outputs, inputs = rule.figures().added.get(self.archive.task, (0, 0))
        return _Carried(
            outputs_added=outputs, inputs_added=inputs, num_free_next=num_free(rule), frozen=not is_open(rule)
        )

    def _measure(self) -> None:
        """Lets rules go on by what the finished task's rows measure."""
        waiting = list(self.archive.waiting)
        with closing(self._reload()) as loaded:
            self.archive.measure(loaded, self.progress)
        for name in waiting:
            self.reports[name] = replace(self.reports[name], **self._carried(name))

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
