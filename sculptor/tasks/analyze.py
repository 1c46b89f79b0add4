"""`sculptor.analyze`: a checkpoint in, a subspace archive out, one matrix in memory at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sculptor import __version__
from sculptor.analysis.ranks import adaptive_retention, measure_cosines, normalize_importance, protected_count
from sculptor.analysis.weights import analyze_matrix, to_device
from sculptor.archive.manifest import Added, Manifest, MatrixRecord, TaskRecord
from sculptor.archive.store import Archive, ArchiveWriter, has_progress
from sculptor.checkpoint.architecture import Architecture, Target, inspect_architecture, select_targets
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.staging import check_apart, commit, staging
from sculptor.checkpoint.tensors import digest
from sculptor.data.examples import Example, digest_examples, encode, resolve_max_length
from sculptor.data.rows import read_rows
from sculptor.errors import SettingsError
from sculptor.model.load import load_model, load_tokenizer, resolve_device
from sculptor.numerics.staircase import Constraint
from sculptor.progress import Progress, silent

# Importance is a mean over tokens: a few hundred rows settle it, more only cost time.
_MAX_IMPORTANCE_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeSettings:
    """Settings of `sculptor analyze`; everything that decides its result."""

    basis: Literal["weights"] = "weights"
    """Where directions come from: the weights' singular vectors."""
    constraint: Constraint = "double"
    """What an update may not touch."""
    preserve: float | None = None
    """The same share of directions in every matrix; None for the adaptive rank."""
    min_retention: float | None = None
    """mrr of the adaptive rank; default 0.1."""
    target_retention: float | None = None
    """trr of the adaptive rank; default 0.8."""
    data: tuple[str, ...] = ()
    """Files whose rows measure the importance for the adaptive rank."""
    targets: tuple[str, ...] = ()
    """Patterns of matrices to protect; default all."""
    exclude: tuple[str, ...] = ()
    """Patterns of matrices to leave out."""
    dtype: Literal["float32", "float64"] = "float32"
    """Dtype of the stored bases."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        wrong = []
        for option, value in (
            ("--preserve", self.preserve),
            ("--min-retention", self.min_retention),
            ("--target-retention", self.target_retention),
        ):
            if value is not None and not 0 <= value <= 1:
                wrong.append(f"{option} {value}: expected a share between 0 and 1, like 0.5")
        if self.preserve == 1:
            wrong.append("--preserve 1: no direction would be left to train; use less than 1")
        if self.preserve is not None:
            unused = [
                option
                for option, given in (
                    ("--min-retention", self.min_retention is not None),
                    ("--target-retention", self.target_retention is not None),
                    ("--data", bool(self.data)),
                )
                if given
            ]
            if unused:
                wrong.append(
                    f"{', '.join(unused)} without effect: --preserve fixes the rank of every matrix; drop one of the two"
                )
        elif self.retention_range[0] > self.retention_range[1]:
            wrong.append("--min-retention {} is above --target-retention {}".format(*self.retention_range))
        if wrong:
            raise SettingsError("; ".join(wrong))

    @property
    def retention_range(self) -> tuple[float, float]:
        """mrr and trr, the paper's 0.1 and 0.8 unless given."""
        minimum = 0.1 if self.min_retention is None else self.min_retention
        target = 0.8 if self.target_retention is None else self.target_retention
        return minimum, target


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """All matrices of one role.

    Attributes:
        preserved: mean share of protected directions.
        energy: mean share of ||W||^2 in them.
        num_free: trainable coordinates; `num_parameters` entries of the matrices.
    """

    role: str
    num_matrices: int
    preserved: float
    energy: float
    num_free: int
    num_parameters: int


@dataclass(frozen=True, slots=True)
class AnalyzeReport:
    """What `analyze` did."""

    output: Path
    constraint: Constraint
    roles: tuple[RoleSummary, ...]
    archive_bytes: int
    checkpoint_bytes: int
    not_targeted: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def num_matrices(self) -> int:
        """Matrices in the archive."""
        return sum(role.num_matrices for role in self.roles)


def analyze(
    model: str | Path,
    output: str | Path,
    settings: AnalyzeSettings | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
) -> AnalyzeReport:
    """Saves the protected subspaces of a checkpoint as an archive.

    Args:
        model: a checkpoint directory or hub name.
        output: the archive's directory.
        settings: what to protect; the default is the paper's adaptive rank.
        overwrite: replace an existing archive, at success.
        resume: take up what a killed run left.
        progress: makes progress bars.

    Returns:
        A table per role.

    Raises:
        SculptorError: if the checkpoint, the data or the output cannot be used.
    """
    settings = settings or AnalyzeSettings()
    checkpoint = open_checkpoint(model)
    architecture = inspect_architecture(checkpoint)
    targets = select_targets(architecture.targets, settings.targets, settings.exclude)
    device = resolve_device(settings.device)
    examples = _read_examples(checkpoint, architecture, settings)
    output = Path(output).resolve()
    check_apart(output, [checkpoint.path, *settings.data])
    with staging(output, overwrite=overwrite, resume=resume, worth_keeping=has_progress) as partial:
        key = {
            "settings": asdict(settings),
            "data": digest_examples(examples),
            "base": identity({target.name: digest(checkpoint[target.name]) for target in targets}),
        }
        writer = ArchiveWriter(partial, getattr(torch, settings.dtype), key)
        writer.resume()
        _check_finite(checkpoint, {target.name for target in targets}, progress)
        importance = _measure_importance(checkpoint, architecture, targets, examples, device, progress)
        bar = progress(total=len(targets), desc="analyze", unit="matrix", initial=len(writer.records))
        for target in targets:
            if target.name not in writer.records:
                _analyze_target(checkpoint, target, settings, importance.get(target.name), device, writer)
                bar.update(1)
        bar.close()
        analysis = TaskRecord("analysis", "analysis", {"model": str(model), "settings": asdict(settings)})
        writer.finish(
            Manifest(
                created_by=f"sculptor {__version__}",
                model_class=architecture.model_class,
                base_identity="",
                basis=settings.basis,
                constraint=settings.constraint,
                settings=asdict(settings),
                tasks=(analysis,),
                matrices={},
                tensors={},
                files={},
                not_targeted=tuple(asdict(item) for item in architecture.not_targeted),
            )
        )
        commit(partial, output)
    return report_of(Archive(output), checkpoint)


def _check_finite(checkpoint: Checkpoint, targets: set[str], progress: Progress) -> None:
    """Tensors that are not decomposed have to be finite too: the model runs on all of them."""
    rest = [name for name in checkpoint if name not in targets]
    bar = progress(total=len(rest), desc="check", unit="tensor")
    for name in rest:
        checkpoint.read_finite(name)
        bar.update(1)
    bar.close()


def _analyze_target(
    checkpoint: Checkpoint,
    target: Target,
    settings: AnalyzeSettings,
    importance: float | None,
    device: torch.device,
    writer: ArchiveWriter,
) -> None:
    retention = settings.preserve
    if retention is None:
        retention = adaptive_retention(1.0 if importance is None else importance, *settings.retention_range)
    k = protected_count(retention, target.shape)
    weight = checkpoint.read_finite(target.name)
    found = analyze_matrix(to_device(weight, target.transposed, device), settings.constraint, k)
    record = MatrixRecord(
        **{name: getattr(target, name) for name in ("name", "parameter", "block", "index", "role", "shape")},
        transposed=target.transposed,
        input_group=target.input_group,
        base_dtype=str(weight.dtype).removeprefix("torch."),
        base_digest=digest(weight),
        steps=found.staircase.steps,
        output=None,
        input=None,
        spectrum=None,
        retention=retention,
        importance=importance,
        energy=found.energy,
        added=(Added(0, found.output.directions if found.output else 0, found.input.directions if found.input else 0),),
    )
    writer.add(record, found.output, found.input, found.spectrum)


def _read_examples(
    checkpoint: Checkpoint, architecture: Architecture, settings: AnalyzeSettings
) -> tuple[Example, ...]:
    """A few rows, spread evenly over the files."""
    if not settings.data:
        return ()
    rows = read_rows(settings.data)
    max_length = resolve_max_length(None, architecture.max_positions)
    found = encode(
        rows, load_tokenizer(checkpoint, architecture.kind), architecture.kind, max_length, architecture.vocab_size
    ).examples
    step = max(1, -(-len(found) // _MAX_IMPORTANCE_ROWS))
    return found[::step]


def _measure_importance(
    checkpoint: Checkpoint,
    architecture: Architecture,
    targets: Sequence[Target],
    examples: Sequence[Example],
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    if not examples:
        return {}
    loaded = load_model(checkpoint, device, architecture)
    bar = progress(total=len(examples), desc="importance", unit="row")
    cosines = measure_cosines(loaded, targets, examples, 0, bar)
    bar.close()
    return normalize_importance(cosines)


def report_of(archive: Archive, checkpoint: Checkpoint) -> AnalyzeReport:
    """The table of an archive, per role in the order of the model."""
    return AnalyzeReport(
        output=archive.path,
        constraint=archive.manifest.constraint,
        roles=summarize_roles(archive),
        archive_bytes=archive.num_bytes,
        checkpoint_bytes=checkpoint.num_bytes,
        not_targeted=archive.manifest.not_targeted,
    )


def summarize_roles(archive: Archive) -> tuple[RoleSummary, ...]:
    """Per role in the order of the model."""
    by_role: dict[str, list[MatrixRecord]] = {}
    for record in archive.values():
        by_role.setdefault(record.role, []).append(record)
    return tuple(
        RoleSummary(
            role,
            len(records),
            preserved=sum(record.preserved for record in records) / len(records),
            energy=sum(record.energy for record in records) / len(records),
            num_free=sum(record.staircase.num_free for record in records),
            num_parameters=sum(record.shape[0] * record.shape[1] for record in records),
        )
        for role, records in by_role.items()
    )
