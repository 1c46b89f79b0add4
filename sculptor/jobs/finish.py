"""What a training run leaves: the merged checkpoint, the updated archive, and the record of how they were made.

One pass over the checkpoint, one matrix in memory: a target is merged in float64, its leak measured on what will be
written, and its entry of the next archive added. Rules that go on by what a task's rows measure follow in a second pass.
"""

import functools
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from sculptor.analysis.leak import measure_leak
from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.places import ANALYZED
from sculptor.archive.store import Entry
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.orientation import to_device
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.vocabulary import Growth
from sculptor.checkpoint.writer import Edit, edits_of, names_as_written, output_dtype, write_checkpoint
from sculptor.checkpoint.written import remove
from sculptor.edits.merge import Merged
from sculptor.jobs.job import TrainJob, cast_to, open_model
from sculptor.jobs.next_archive import NextArchive
from sculptor.jobs.readme import write_readme
from sculptor.jobs.train_record import train_readme, training_record
from sculptor.jobs.train_report import MatrixReport, TrainReport
from sculptor.methods.method import Derived
from sculptor.methods.rule import Rule, is_open, num_free
from sculptor.model.load import LoadedModel, load_model, load_streamed
from sculptor.progress import Progress
from sculptor.training.loop import LoopResult
from sculptor.training.rows import row_owners, rows_name
from sculptor.training.stepping.updates import Trained, merge_trained
from sculptor.world import ALONE, World


def write_output(
    job: TrainJob,
    loaded: LoadedModel,
    updates: Trained,
    result: LoopResult,
    output: Path,
    partial: Path,
    progress: Progress,
    world: World = ALONE,
) -> TrainReport:
    """Writes checkpoint, archive, metrics and record of a finished loop into `partial / "output"`.

    Several processes merge and carry on some matrices each; the first one writes.

    Raises:
        OutputError: if a file cannot be written.
        TrainingError: if merged values do not fit the dtype they are saved in.
    """
    updates.release_model()
    staged = partial / "output"
    world.once(lambda: _make_anew(staged))
    with closing(NextArchive(job, staged / "subspaces", loaded.device)) as archive:
        finish = _Finish(job, loaded, updates, staged, archive, progress, world)
        finish.write()
        report = world.once(lambda: finish.tell(result, output))
    world.once(lambda: _copy_metrics(partial, staged))
    return report


def _make_anew(staged: Path) -> None:
    remove(staged)
    with writing(staged):
        (staged / "subspaces").mkdir(parents=True, exist_ok=True)


def _copy_metrics(partial: Path, staged: Path) -> None:
    with writing(staged / "metrics.jsonl"):
        shutil.copyfile(partial / "metrics.jsonl", staged / "metrics.jsonl")


class _Made(NamedTuple):
    """A matrix as it will be written, its entry of the next archive, and its figures."""

    tensor: Tensor
    record: MatrixRecord
    derived: Derived | None
    report: MatrixReport


class _Carried(TypedDict):
    """Fields of a matrix's report."""

    outputs_added: int
    inputs_added: int
    num_free_next: int
    frozen: bool


class _Packing:
    """Makes rules ready to travel from one process to the first: in host memory, and what matrices share only once."""

    def __init__(self) -> None:
        self._sent: set[tuple[str, str]] = set()

    def pack(self, record: MatrixRecord, derived: Derived) -> Derived:
        """The same rule; tensors that went before, which the writer has by then, are empty."""
        tensors = {}
        for name, tensor in derived.tensors.items():
            key = (record.input_group, name)
            tensors[name] = torch.empty(0) if key in self._sent else tensor.cpu()
            if name in derived.shared:
                self._sent.add(key)
        return replace(derived, tensors=tensors)


@dataclass(eq=False)
class _Finish:
    """One output on its way: merges one matrix at a time, and makes its figures."""

    job: TrainJob
    loaded: LoadedModel
    updates: Trained
    staged: Path
    archive: NextArchive
    progress: Progress
    world: World

    def __post_init__(self) -> None:
        self.device = self.loaded.device
        self.saved = cast_to(self.job.settings)
        self.reports: dict[str, MatrixReport] = {}
        self.opened = _files_of(self.loaded, self.job.architecture, self.updates.extra)
        self.new_rows = _row_edits(self.loaded, self.job.growth, self.updates.extra, self.saved)
        self.num_trainable = self.updates.num_trainable
        self._packing = _Packing()
        self._coming: Iterator[_Made] = iter(())

    def write(self) -> None:
        """The checkpoint, and the archive's tensors."""
        job, world = self.job, self.world
        names = names_as_written(job.checkpoint, job.archive, self.saved)
        owners = [self.updates.owners.get(name, i % world.size) for i, name in enumerate(names)]
        with job.archive.ahead(name for name, owner in zip(names, owners, strict=True) if owner == world.rank):
            if world.size > 1:
                self._coming = world.in_order(names, self._parcel, owners)
            if world.first:
                with closing(self.progress(total=job.checkpoint.num_bytes, desc="write", unit="B")) as bar:
                    write_checkpoint(job.checkpoint, self.staged, self._edits(self.opened), dtype=self.saved, bar=bar)
            assert next(self._coming, None) is None  # where others are the first, the work is done here
        waiting = self.world.from_first(self.archive.waiting)
        if waiting:
            self._measure(waiting)

    def tell(self, result: LoopResult, output: Path) -> TrainReport:
        """The archive's manifest and the record."""
        job, opened = self.job, self.opened
        previous = read_record(job.checkpoint.path)
        report = TrainReport(
            output=output,
            loop=result,
            placement=job.placement,
            num_examples=job.num_rows,
            num_dropped=job.encoded.num_dropped,
            num_cut=job.encoded.num_cut,
            num_trainable=self.num_trainable,
            num_protected=sum(record.shape[0] * record.shape[1] for record in job.archive.values())
            - job.archive.num_free,
            carry=self.archive.carry,
            also_trained=tuple(sorted({*previous.also_trained, *opened})),
            opened=tuple(sorted(opened)),
            not_targeted=job.archive.manifest.not_targeted,
            learning_rate=job.settings.learning_rate,
            relative_rate=job.settings.relative_rate,
            scaled=job.archive.method.defaults.scaled,
            max_harm=result.max_harm,
            matrices={name: self.reports[name] for name in job.archive},
            new_tokens=job.growth.tokens if job.growth else (),
            classes=job.architecture.classes,
            num_measured=self.archive.num_measured,
        )
        self.archive.finish(report.num_examples, result.steps, self.updates, report.opened)
        analyzed = (self.staged.parent / ANALYZED).is_dir()
        record = training_record(job, report, previous.lineage, self.saved, analyzed=analyzed)
        write_json(self.staged / RECORD_NAME, record)
        write_readme(self.staged, train_readme(job, report, analyzed=analyzed))
        return report

    def _edits(self, opened: Mapping[str, nn.Parameter]) -> dict[str, Edit | Mapping[int, Edit]]:
        """What makes the new tensors: merged matrices, and openly trained parameters."""
        edits = {name: functools.partial(_cast_like, value, self.saved) for name, value in opened.items()}
        matrices = edits_of(self.job.archive.values(), lambda record: functools.partial(self._write, record.name))
        return {**edits, **self.new_rows, **matrices}

    def _write(self, name: str, weight: Tensor) -> Tensor:
        """The merged matrix, given the base's as stored."""
        made = self._make(name, weight) if self.world.size == 1 else next(self._coming)
        assert made.record.name == name
        self.archive.add(made.record, made.derived)
        self.reports[name] = made.report
        return made.tensor

    def _parcel(self, name: str) -> Iterator[_Made]:
        """A matrix for the first process."""
        made = self._make(name, self.job.checkpoint.matrix(self.job.archive[name]))
        if made.derived is not None:
            made = made._replace(derived=self._packing.pack(made.record, made.derived))
        yield made

    def _make(self, name: str, weight: Tensor) -> _Made:
        dtype = output_dtype(weight.dtype, self.saved)
        entry = self.job.archive.read(name)
        merged = merge_trained(self.updates, entry, weight, dtype)
        if merged is None:
            nothing = torch.zeros(entry.rule.shape, dtype=torch.float64, device=self.device)
            merged = Merged(weight.to(dtype), nothing)
        record, derived = self.archive.make(entry, merged)
        return _Made(merged.tensor, record, derived, self._report(entry, record, weight, merged))

    def _report(self, entry: Entry, record: MatrixRecord, weight: Tensor, merged: Merged) -> MatrixReport:
        measured = measure_leak(weight, merged.tensor, entry, self.device, detailed=False)
        before, after = (to_device(each, record.transposed, self.device) for each in (weight, merged.tensor))
        norm = float(merged.update.norm())
        lost = float((after - before - merged.update.to(self.device)).norm())
        return MatrixReport(
            role=record.role,
            update=measured.update / (float(before.norm()) or 1.0),
            leak=measured.violation.norm / measured.update if measured.update else 0.0,
            rounding=measured.violation.rounding / measured.update if measured.update else 0.0,
            update_norm=norm,
            rounding_loss=lost / norm if norm else 0.0,
            **self._carried(record.rule),
        )

    def _carried(self, rule: Rule) -> _Carried:
        """What the next archive makes of a matrix."""
        outputs, inputs = rule.figures().added.get(self.archive.task, (0, 0))
        return _Carried(
            outputs_added=outputs, inputs_added=inputs, num_free_next=num_free(rule), frozen=not is_open(rule)
        )

    def _measure(self, waiting: Mapping[str, MatrixRecord]) -> None:
        """Lets rules go on by what the finished task's rows measure."""
        with closing(self._reload()) as loaded:
            self.archive.measure(loaded, waiting, self.progress, self.world)
        for name in waiting if self.world.first else ():
            self.reports[name] = replace(self.reports[name], **self._carried(self.archive.record(name).rule))

    def _reload(self) -> LoadedModel:
        """What was written, rounding and all: the archive belongs to that, however the model was trained."""
        merged, stream = open_checkpoint(self.staged, self.job.settings.attn_implementation), self.loaded.stream
        if self.updates.goes_on:
            return open_model(merged, self.device, self.job.architecture, "auto", progress=self.progress)
        self.updates.close()
        if stream is not None:
            tier = stream.weights.scratch.tier
            # Every process reads all of it: what was divided is in nobody's memory as a whole.
            return load_streamed(merged, self.device, "disk" if stream.divided else tier, progress=self.progress)
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


def _row_edits(
    loaded: LoadedModel, growth: Growth | None, extra: Mapping[str, nn.Parameter], saved: torch.dtype | None
) -> dict[str, Edit]:
    """Tensor of the checkpoint -> what puts its trained new rows in."""
    if growth is None:
        return {}
    found = {names: rows_name(parameter, growth) for parameter, names in row_owners(loaded.model, growth).items()}
    return {
        tensor: functools.partial(_with_rows, extra[name], growth, saved)
        for names, name in found.items()
        if name in extra  # else it was trained as a whole
        for tensor in names
    }


def _with_rows(values: Tensor, growth: Growth, saved: torch.dtype | None, tensor: Tensor) -> Tensor:
    """A tensor of the base with new rows in the place of those they started from."""
    made = tensor.to(output_dtype(tensor.dtype, saved), copy=True)
    made[growth.start : growth.stop] = values.detach().cpu().to(made.dtype)
    return made


def _cast_like(value: Tensor, saved: torch.dtype | None, tensor: Tensor) -> Tensor:
    """An openly trained parameter in the dtype that the base's `tensor` is written in."""
    return value.detach().cpu().to(output_dtype(tensor.dtype, saved))
