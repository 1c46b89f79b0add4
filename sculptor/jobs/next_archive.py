"""The archive of a training's output: each rule is carried on as its matrix is written, or once the task's rows were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sculptor import __version__
from sculptor.analysis.derive import Measurement, decide, write_measured
from sculptor.analysis.evidence import Source
from sculptor.archive.manifest import MatrixRecord, TaskRecord
from sculptor.archive.store import Archive, Entry
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.orientation import to_device
from sculptor.checkpoint.tensors import digest, dtype_name
from sculptor.edits.merge import Merged
from sculptor.jobs.job import TrainJob
from sculptor.jobs.memory import memory_of
from sculptor.jobs.precision import SECTION as PRECISION_SECTION
from sculptor.jobs.precision import write_precision
from sculptor.methods.method import Carrying, Derived, Evidence, carries_of, measures_of
from sculptor.model.load import LoadedModel
from sculptor.numerics.rounding import rms
from sculptor.progress import Progress
from sculptor.training.stepping.updates import Trained
from sculptor.world import World


class NextArchive:
    """An archive on its way: `add` every matrix, `measure` where rules wait for that, and `finish`; then `close`.

    Args:
        job: the training.
        directory: an existing directory, staged by the caller.
        device: where rules are made.
    """

    def __init__(self, job: TrainJob, directory: Path, device: torch.device) -> None:
        self._job = job
        self._device = device
        self._method = job.archive.method
        self.carry = job.settings.carry or carries_of(self._method)[0]
        self.task = len(job.archive.manifest.tasks)
        self._measures = measures_of(self._method, "carry", self.carry)
        self._writer = ArchiveWriter(
            directory, getattr(torch, job.archive.manifest.settings.dtype), {}, job.archive.kinds
        )
        self.waiting: dict[str, MatrixRecord] = {}
        """Matrices whose rules wait for what is to be measured."""
        self.num_measured: int | None = None
        """Of the task's rows, once they are."""

    def make(self, entry: Entry, merged: Merged) -> tuple[MatrixRecord, Derived | None]:
        """What is known of a matrix as it will be written, and its rule carried on, if that is decided by now."""
        record = replace(
            entry.record,
            base_digest=digest(merged.tensor),
            base_dtype=dtype_name(merged.tensor.dtype),
            base_rms=rms(merged.tensor),
        )
        if not self._carries:
            kept = self._kept[record.name]
            return replace(record, rule=kept.rule, tensors=kept.tensors), None
        if self._measures != "nothing":
            return record, None
        assert isinstance(self._method, Carrying)
        evidence = Evidence(
            name=record.name,
            shape=record.shape,
            weight=lambda: to_device(merged.tensor, record.transposed, self._device),
            update=merged.update,
            task=self.task,
        )
        derived = self._method.carry(self.carry, entry, evidence)
        return replace(record, rule=derived.rule), derived

    def add(self, record: MatrixRecord, derived: Derived | None) -> None:
        """Takes what `make` gave; a rule that has to be measured waits."""
        if derived is not None:
            self._writer.add(record, derived)
        elif self._carries:
            self.waiting[record.name] = record
        else:
            self._writer.keep(record, self._kept)

    @property
    def _kept(self) -> Archive:
        """As it was given: what one task's rows opened is for that task."""
        return self._job.unopened or self._job.archive

    @property
    def _carries(self) -> bool:
        return isinstance(self._method, Carrying) and self.carry != "keep"

    def record(self, name: str) -> MatrixRecord:
        """What is known of a matrix that was added; while it waits, with its rule of before."""
        return self.waiting.get(name) or self._writer.record(name)

    def measure(
        self, loaded: LoadedModel, waiting: Mapping[str, MatrixRecord], progress: Progress, world: World
    ) -> None:
        """Carries on the rules that wait, from a few hundred of the task's rows.

        Args:
            loaded: what was written, unprotected.
            waiting: what is known of their matrices.
            progress: makes progress bars.
            world: the processes that share the work.
        """
        job, archive, method = self._job, self._job.archive, self._method
        assert isinstance(method, Carrying)
        weight, rows = job.settings.memory_weight or 1.0, memory_of(job)
        asked = Measurement(
            records=waiting,
            targets=[target for target in job.architecture.targets if target.name in waiting],
            sources=[Source(job.name, rows, weight)],
            measures=self._measures,
            settings=archive.manifest.settings,
            make=lambda evidence: method.carry(self.carry, archive.read(evidence.name), evidence),
            task=self.task,
        )
        write_measured(loaded, asked, self._writer, progress, world)
        world.once(lambda: decide(self._writer, method, [*archive.manifest.source_weights, weight]))
        self.waiting, self.num_measured = {}, len(rows)

    def finish(self, rows: int, steps: int, trained: Trained, opened: Sequence[str] = ()) -> None:
        """Writes the last shard and archive.json, with the task in its history, and how sure its optimizer was."""
        settings, manifest = self._job.settings, self._job.archive.manifest
        task = TaskRecord(
            self._job.name,
            "training",
            opened=tuple(opened),
            weights=() if self._measures == "nothing" else (settings.memory_weight or 1.0,),
            details={
                "data": list(self._job.data),
                "rows": rows,
                "steps": steps,
                "carry": self.carry,
                "learning_rate": settings.learning_rate,
                "relative_rate": settings.relative_rate,
            },
        )
        # Precision is of coordinates, in the bases of rules that are kept.
        bayes = settings.optimizer == "bayes-adam"
        self._writer.keep_sections(self._kept, {PRECISION_SECTION} if bayes or self.carry != "keep" else ())
        if bayes:
            write_precision(self._writer, self._kept, trained)
        self._writer.finish(replace(manifest, created_by=f"sculptor {__version__}", tasks=(*manifest.tasks, task)))

    def close(self) -> None:
        """Nothing is written any more once this returns."""
        self._writer.close()
