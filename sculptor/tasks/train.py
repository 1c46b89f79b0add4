"""`sculptor.train`: checkpoint, archive and rows in; merged checkpoint, updated archive and report out.

Everything is staged in `<output>.partial`: saved states and metrics while the loop runs, then the complete output
in its folder `output`, which a rename puts in its place.
"""

import fnmatch
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculptor import __version__
from sculptor.analysis.carry import accumulate, retake
from sculptor.analysis.verify import measure_leak
from sculptor.archive.manifest import Added, TaskRecord
from sculptor.archive.store import Archive, ArchiveWriter, Subspaces
from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.staging import commit, staging, write_json, writing
from sculptor.checkpoint.tensors import digest
from sculptor.checkpoint.writer import output_dtype, write_checkpoint
from sculptor.data.examples import Encoded, encode, resolve_max_length
from sculptor.data.rows import read_rows
from sculptor.errors import CapacityError, CheckpointError, DataError, SettingsError
from sculptor.evaluation.loss import mean_loss
from sculptor.model.load import (
    LoadedModel,
    checkpoint_activations,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
)
from sculptor.progress import Progress, silent
from sculptor.training.coordinates import (
    Coordinates,
    attach_coordinates,
    merged_weight,
    protected_blocks,
    protected_matrices,
)
from sculptor.training.loop import LoopResult, TrainedParameters, TrainingLoop, make_accelerator
from sculptor.training.settings import TrainSettings
from sculptor.training.state import STATE_NAME, StateStore, has_state


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """What the run did to one matrix.

    Attributes:
        update: ||dW|| / ||W||.
        leak: ||frozen part of dW|| / ||dW||, measured on the tensor that was written.
        rounding_loss: ||W' - (W + dW)|| / ||dW||: the share of the update that rounding ate.
        outputs_added, inputs_added: directions the archive gained.
        frozen: nothing is left free in it.
    """

    role: str
    update: float
    leak: float
    rounding_loss: float
    outputs_added: int
    inputs_added: int
    frozen: bool


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What `train` did."""

    output: Path
    loop: LoopResult
    num_examples: int
    num_dropped: int
    num_cut: int
    num_trainable: int
    num_protected: int
    also_trained: tuple[str, ...]
    not_targeted: tuple[Mapping[str, Any], ...]
    matrices: Mapping[str, MatrixReport]

    @property
    def max_leak(self) -> float:
        """Of the matrix with the largest."""
        return max((matrix.leak for matrix in self.matrices.values()), default=0.0)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Matrices with no free direction left."""
        return tuple(name for name, matrix in self.matrices.items() if matrix.frozen)


@dataclass(frozen=True, eq=False, slots=True)
class _Job:
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


def train(
    model: str | Path,
    subspaces: str | Path,
    data: Sequence[str | Path],
    output: str | Path,
    settings: TrainSettings | None = None,
    *,
    eval_data: Sequence[str | Path] = (),
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    stop: Callable[[], int | None] = lambda: None,
) -> TrainReport:
    """Teaches a checkpoint a task inside what an archive leaves free.

    Args:
        model: the checkpoint directory or hub name.
        subspaces: its subspace archive.
        data: JSONL or text files of the task.
        output: directory of the merged checkpoint, with the updated archive in `subspaces/`.
        settings: how to train.
        eval_data: files whose loss chooses the best parameters of the run.
        overwrite: replace an existing output, at success; discard left-overs.
        resume: take up the newest saved state of a run that did not finish.
        progress: makes progress bars.
        stop: polled after every step; a signal number saves the state and ends the run.

    Returns:
        Figures of the run and of every matrix.

    Raises:
        SculptorError: if an input or the output cannot be used, or the run cannot go on.
    """
    settings = settings or TrainSettings()
    output = Path(output)
    device = resolve_device(settings.device)
    make_accelerator(device)  # refuses several processes before any work
    job = _open_job(model, subspaces, data, eval_data, settings, progress)
    with staging(output, overwrite=overwrite, resume=resume, worth_keeping=has_state) as partial:
        loaded = load_model(job.checkpoint, device, job.architecture)
        parameters = _prepare_model(loaded, job)
        loop = TrainingLoop(
            loaded,
            parameters,
            job.encoded.examples,
            job.settings,
            store=StateStore(partial / STATE_NAME, _run_key(job), _fingerprints(loaded.model)),
            metrics=partial / "metrics.jsonl",
            evaluate=_evaluator(loaded, job),
            stop=stop,
        )
        result = loop.run(progress)
        report = _write_output(job, loaded, parameters, result, output, partial, progress)
        commit(partial / "output", output)
        shutil.rmtree(partial)
    return report


def _open_job(
    model: str | Path,
    subspaces: str | Path,
    data: Sequence[str | Path],
    eval_data: Sequence[str | Path],
    settings: TrainSettings,
    progress: Progress,
) -> _Job:
    checkpoint = open_checkpoint(model)
    architecture = inspect_architecture(checkpoint)
    if architecture.kind == "headless":
        raise CheckpointError(
            f"{checkpoint.path}: {architecture.model_class} has no language-modelling head to train with; expected a causal, "
            'masked or encoder-decoder language model in "architectures"'
        )
    archive = Archive(subspaces)
    if not any(record.staircase.num_free for record in archive.values()):
        raise CapacityError(f"{archive.path}: no capacity left: all {len(archive)} matrices are frozen")
    archive.check_base(checkpoint, progress)
    tokenizer, config = load_tokenizer(checkpoint), load_config(checkpoint)
    settings = replace(settings, max_length=resolve_max_length(settings.max_length, config))
    assert settings.max_length is not None
    if architecture.kind == "masked" and tokenizer.mask_token_id is None:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has no mask token; masked language modelling needs one"
        )
    files = tuple(map(str, data))
    if not files:
        raise DataError("no data: pass at least one file")
    encoded = encode(read_rows(files), tokenizer, architecture.kind, settings.max_length)
    evaluation = None
    if eval_data:
        evaluation = encode(read_rows(tuple(map(str, eval_data))), tokenizer, architecture.kind, settings.max_length)
    extra = _select_extra(architecture, archive, settings.also_train)
    name = Path(files[0]).stem if Path(files[0]).stem != "train" else Path(files[0]).resolve().parent.name
    return _Job(checkpoint, architecture, archive, settings, files, encoded, evaluation, name, extra)


def _select_extra(architecture: Architecture, archive: Archive, patterns: Sequence[str]) -> dict[str, str]:
    """Openly trained parameters: parameter of the model -> tensor of the checkpoint."""
    candidates = {
        parameter: name
        for parameter, name in architecture.tensors.items()
        if name not in archive and parameter in architecture.parameters
    }
    chosen: dict[str, str] = {}
    for pattern in patterns:
        found = {
            p: name for p, name in candidates.items() if fnmatch.fnmatchcase(p, pattern) or pattern in p.split(".")
        }
        if not found:
            raise SettingsError(
                f"--also-train {pattern!r} matches no unprotected parameter; use a glob on names like {next(iter(candidates))}"
            )
        chosen |= found
    return chosen


def _prepare_model(loaded: LoadedModel, job: _Job) -> TrainedParameters:
    """Protects the model and opens what else is trained, in float32."""
    on_gpu = loaded.device.type == "cuda"
    attach_coordinates(loaded.model, job.archive, compute_dtype=torch.bfloat16 if on_gpu else None, fold="manual")
    extra: dict[str, nn.Parameter] = {}
    for parameter in job.extra:
        value = loaded.model.get_parameter(parameter)
        value.data = value.data.to(torch.float32)
        value.requires_grad_(True)
        extra[parameter] = value
    recompute = on_gpu if job.settings.checkpoint_activations is None else job.settings.checkpoint_activations
    if recompute:
        checkpoint_activations(loaded.model)
    return TrainedParameters(tuple(protected_blocks(loaded.model)), extra)


def _evaluator(loaded: LoadedModel, job: _Job) -> Callable[[], float] | None:
    if job.evaluation is None:
        return None
    examples, size = job.evaluation.examples, job.settings.micro_batch_size
    accelerator = make_accelerator(loaded.device)

    def evaluate() -> float:
        with accelerator.autocast():
            return mean_loss(loaded, examples, size)[0]

    return evaluate


def _run_key(job: _Job) -> dict[str, Any]:
    """What has to be the same for a saved state to be taken up."""
    settings = asdict(job.settings)
    settings.pop("save_every")
    examples = [job.encoded.examples, job.evaluation.examples if job.evaluation else ()]
    return settings | {
        "base": job.archive.manifest.base_identity,
        "subspaces": _archive_identity(job.archive),
        "data": [_digest_examples(part) for part in examples],
        "threads": torch.get_num_threads(),
    }


def _digest_examples(examples: Sequence[Any]) -> str:
    flat = [value for example in examples for value in (*example.input_ids, -1, *example.labels, -2)]
    return digest(torch.tensor(flat, dtype=torch.int64)) if flat else ""


def _archive_identity(archive: Archive) -> str:
    return identity({name: stored.sha256 for name, stored in archive.manifest.tensors.items()})


def _fingerprints(model: nn.Module) -> dict[str, list[float]]:
    return {matrix.coordinates.name: matrix.coordinates.fingerprint() for matrix in protected_matrices(model)}


def _write_output(
    job: _Job,
    loaded: LoadedModel,
    parameters: TrainedParameters,
    result: LoopResult,
    output: Path,
    partial: Path,
    progress: Progress,
) -> TrainReport:
    staged = partial / "output"
    shutil.rmtree(staged, ignore_errors=True)
    with writing(staged):
        (staged / "subspaces").mkdir(parents=True)
    saved = None if job.settings.save_dtype == "keep" else getattr(torch, job.settings.save_dtype)
    first_dtype = next(iter(job.archive.manifest.tensors.values())).dtype if job.archive.manifest.tensors else "float32"
    writer = ArchiveWriter(staged / "subspaces", getattr(torch, first_dtype), {})
    previous = read_record(job.checkpoint.path)
    matrices = _MatrixWriter(job, loaded, writer, saved, len(job.archive.manifest.tasks))
    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        name: functools.partial(matrices.write, name) for name in job.archive
    }
    for parameter, name in job.extra.items():
        replacements[name] = functools.partial(_cast_like, parameters.extra[parameter], saved)
    bar = progress(total=sum(info.num_bytes for info in job.checkpoint.infos.values()), desc="write", unit="B")
    write_checkpoint(job.checkpoint, staged, replacements, dtype=saved, bar=bar)
    bar.close()
    also_trained = tuple(sorted({*previous.also_trained, *job.extra.values()}))
    report = TrainReport(
        output=output,
        loop=result,
        num_examples=len(job.encoded.examples),
        num_dropped=job.encoded.num_dropped,
        num_cut=job.encoded.num_cut,
        num_trainable=sum(a.numel() for a in parameters.named().values()),
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
            "carry": job.settings.carry,
            "learning_rate": job.settings.learning_rate,
        },
    )
    writer.finish(
        replace(job.archive.manifest, created_by=f"sculptor {__version__}", tasks=(*job.archive.manifest.tasks, task))
    )
    with writing(staged):
        shutil.copyfile(partial / "metrics.jsonl", staged / "metrics.jsonl")
    write_json(staged / RECORD_NAME, _output_record(job, report, previous.lineage))
    return report


def _cast_like(value: Tensor, saved: torch.dtype | None, tensor: Tensor) -> Tensor:
    """An openly trained parameter in the dtype that the base's `tensor` is written in."""
    return value.detach().cpu().to(output_dtype(tensor.dtype, saved))


class _MatrixWriter:
    """Merges one matrix at a time: makes the tensor to write, its archive entry and its figures."""

    def __init__(
        self, job: _Job, loaded: LoadedModel, writer: ArchiveWriter, saved: torch.dtype | None, task: int
    ) -> None:
        self.job = job
        self.device = loaded.device
        self.writer = writer
        self.saved = saved
        self.task = task
        self.coordinates = {matrix.coordinates.name: matrix.coordinates for matrix in protected_matrices(loaded.model)}
        self.reports: dict[str, MatrixReport] = {}

    def write(self, name: str, weight: Tensor) -> Tensor:
        """The merged tensor, given the base's as stored."""
        dtype = output_dtype(weight.dtype, self.saved)
        subspaces = self.job.archive.read(name)
        coordinates = self.coordinates.get(name)
        if coordinates is None:
            merged, update = weight.to(dtype), torch.zeros(subspaces.record.shape, dtype=torch.float64)
        else:
            merged, update = self._merge(coordinates, weight, dtype)
        self._carry(subspaces, merged, update)
        measured = measure_leak(weight, merged, subspaces, self.device)
        stored = update.T if subspaces.record.transposed else update
        norm = float(update.norm())
        lost = float((merged.to(torch.float64) - weight.to(torch.float64) - stored.cpu()).norm())
        record = self.writer.record(name)
        self.reports[name] = MatrixReport(
            role=record.role,
            update=measured.update / (float(weight.to(torch.float64).norm()) or 1.0),
            leak=measured.frozen / measured.update if measured.update else 0.0,
            rounding_loss=lost / norm if norm else 0.0,
            outputs_added=record.added[-1].outputs if record.added[-1].task == self.task else 0,
            inputs_added=record.added[-1].inputs if record.added[-1].task == self.task else 0,
            frozen=record.staircase.num_free == 0,
        )
        return merged

    def _merge(self, coordinates: Coordinates, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        merged = merged_weight(coordinates, weight.to(self.device), dtype).cpu()
        if not bool(merged.isfinite().all()):
            raise CheckpointError(f"{coordinates.name}: merged values overflow {dtype}; use --save-dtype float32")
        return merged, coordinates.update64()

    def _carry(self, subspaces: Subspaces, merged: Tensor, update: Tensor) -> None:
        record, constraint = subspaces.record, self.job.archive.manifest.constraint
        spectrum = self.job.archive.spectrum(record.name)
        record = replace(record, base_digest=digest(merged), base_dtype=str(merged.dtype).removeprefix("torch."))
        if self.job.settings.carry == "retake":
            weight = merged.to(self.device, torch.float64)
            found = retake(record, weight.T if record.transposed else weight, constraint)
            record = replace(record, steps=found.staircase.steps, energy=found.energy)
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


def _output_record(job: _Job, report: TrainReport, lineage: tuple[str, ...]) -> dict[str, Any]:
    """sculptor.json: how the output came about."""
    import accelerate
    import safetensors
    import transformers

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
        "lineage": [*lineage, job.archive.manifest.base_identity],
        "base_digests": {name: record.base_digest for name, record in job.archive.items()},
        "also_trained": list(report.also_trained),
        "not_targeted": [dict(item) for item in report.not_targeted],
        "frozen": list(report.frozen),
        "examples": {"rows": report.num_examples, "dropped": report.num_dropped, "cut": report.num_cut},
        "num_trainable": report.num_trainable,
        "result": asdict(report.loop),
        "matrices": {name: asdict(matrix) for name, matrix in report.matrices.items()},
    }
