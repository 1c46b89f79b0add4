"""`sculptor.analyze`: a checkpoint in, a subspace archive out; one matrix at a time, or the moments of a few blocks."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sculptor import __version__
from sculptor.analysis.factors import Source
from sculptor.analysis.ranks import adaptive_retention, measure_cosines, normalize_importance, protected_count
from sculptor.analysis.settings import AnalyzeSettings
from sculptor.analysis.weights import analyze_matrix, random_directions, to_device
from sculptor.archive.manifest import Added, ArchiveConstraint, Manifest, MatrixRecord, TaskRecord
from sculptor.archive.store import Archive
from sculptor.archive.writer import ArchiveWriter, has_progress
from sculptor.checkpoint.architecture import Architecture, Target, inspect_architecture, select_targets
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.staging import check_apart, commit, staging
from sculptor.checkpoint.tensors import digest
from sculptor.data.examples import IGNORED, Example, digest_examples, encode, resolve_max_length
from sculptor.data.rows import read_rows
from sculptor.model.load import load_model, load_tokenizer, resolve_device
from sculptor.numerics.staircase import Staircase
from sculptor.progress import Progress, silent
from sculptor.tasks.memory import read_sources, sample_sources, settle, write_factors
from sculptor.tasks.placement import open_model
from sculptor.training.settings import Offload

# Importance is a mean over tokens: a few hundred rows settle it, more only cost time.
_MAX_IMPORTANCE_ROWS = 256


@dataclass(frozen=True, slots=True)
class RoleSummary:
    """All matrices of one role.

    Attributes:
        preserved: mean share of protected directions.
        energy: mean share of ||W||^2, or of the curvature, in them.
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
    """What `analyze` did; `calibration` are rows and tokens of every source, `most_directions` the most a side stores."""

    output: Path
    basis: str
    constraint: str
    roles: tuple[RoleSummary, ...]
    archive_bytes: int
    checkpoint_bytes: int
    not_targeted: tuple[Mapping[str, Any], ...] = field(default=())
    calibration: tuple[Mapping[str, Any], ...] = ()
    most_directions: int = 0

    @property
    def num_matrices(self) -> int:
        """Matrices in the archive."""
        return sum(role.num_matrices for role in self.roles)


def analyze(
    model: str | Path,
    output: str | Path,
    settings: AnalyzeSettings | None = None,
    *,
    offload: Offload = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
) -> AnalyzeReport:
    """Saves the protected subspaces of a checkpoint as an archive.

    Args:
        model: a checkpoint directory or hub name.
        output: the archive's directory.
        settings: what to protect; the default is the weights' directions with the paper's adaptive rank.
        offload: with calibration, where the model's blocks wait that are not being computed: none, cpu, disk, or auto.
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
    sources = read_sources(checkpoint, architecture, targets, settings) if settings.has_moments else []
    examples = () if settings.has_moments else _read_examples(checkpoint, architecture, settings)
    output = Path(output).resolve()
    check_apart(output, [checkpoint.path, *settings.data])
    with staging(output, overwrite=overwrite, resume=resume, worth_keeping=has_progress) as partial:
        digests = {target.name: digest(checkpoint[target.name]) for target in targets}
        key = {
            "settings": asdict(settings),
            "data": [digest_examples(part) for part in (examples, *(source.examples for source in sources))],
            "base": identity(digests),
        }
        with closing(ArchiveWriter(partial, getattr(torch, settings.dtype), key)) as writer:
            writer.resume()
            if settings.has_moments:
                loaded = open_model(checkpoint, device, architecture, offload, progress=progress)
                with closing(loaded):
                    sources += sample_sources(loaded, settings, progress)
                    records = [_new_record(checkpoint, target, settings, digests[target.name]) for target in targets]
                    write_factors(loaded, records, targets, sources, settings, writer, None, progress)
                settle(writer, settings, [source.weight for source in sources])
            else:
                _check_finite(checkpoint, {target.name for target in targets}, progress)
                importance = _measure_importance(
                    checkpoint, architecture, targets, examples, settings.seed, device, progress
                )
                bar = progress(total=len(targets), desc="analyze", unit="matrix", initial=len(writer.records))
                for target in targets:
                    if target.name not in writer.records:
                        record = _new_record(checkpoint, target, settings, digests[target.name])
                        _analyze_target(
                            checkpoint, target, record, settings, importance.get(target.name), device, writer
                        )
                        bar.update(1)
                bar.close()
            details: dict[str, Any] = {"model": str(model), "settings": asdict(settings)}
            if settings.has_moments:
                details |= {"weights": [source.weight for source in sources]}
                details |= {"calibration": [_facts(source) for source in sources]}
            writer.finish(
                Manifest(
                    created_by=f"sculptor {__version__}",
                    model_class=architecture.model_class,
                    base_identity="",
                    basis=settings.basis,
                    constraint=archive_constraint(settings),
                    settings=asdict(settings),
                    tasks=(TaskRecord("analysis", "analysis", details),),
                    matrices={target.name: writer.record(target.name) for target in targets},
                    tensors={},
                    files={},
                    not_targeted=tuple(asdict(item) for item in architecture.not_targeted),
                )
            )
        commit(partial, output)
    return report_of(Archive(output), checkpoint)


def _facts(source: Source) -> dict[str, Any]:
    labels = [label for example in source.examples for label in example.labels]
    return {
        "source": source.name,
        "rows": len(source.examples),
        "tokens": sum(len(example.input_ids) for example in source.examples),
        "tokens_with_loss": sum(label != IGNORED for label in labels),
    }


def archive_constraint(settings: AnalyzeSettings) -> ArchiveConstraint:
    """What the archive of an analysis constrains."""
    if settings.has_moments:
        return "staircase" if settings.basis == "curvature" else "input"
    return settings.constraint or "double"


def _check_finite(checkpoint: Checkpoint, targets: set[str], progress: Progress) -> None:
    """Tensors that are not decomposed have to be finite too: the model runs on all of them."""
    rest = [name for name in checkpoint if name not in targets]
    bar = progress(total=len(rest), desc="check", unit="tensor")
    for name in rest:
        checkpoint.read_finite(name)
        bar.update(1)
    bar.close()


def _new_record(checkpoint: Checkpoint, target: Target, settings: AnalyzeSettings, base_digest: str) -> MatrixRecord:
    """What is known of a matrix before it is analyzed."""
    return MatrixRecord(
        **{name: getattr(target, name) for name in ("name", "parameter", "block", "index", "role", "shape")},
        transposed=target.transposed,
        input_group=target.input_group,
        base_dtype=str(checkpoint.infos[target.name].dtype).removeprefix("torch."),
        base_digest=base_digest,
        steps=Staircase.closed(*target.shape).steps,
        output=None,
        input=None,
        spectrum=None,
        retention=1 - settings.free_budget,
        importance=None,
        energy=0.0,
        added=(Added(0, 0, 0),),
    )


def _analyze_target(
    checkpoint: Checkpoint,
    target: Target,
    record: MatrixRecord,
    settings: AnalyzeSettings,
    importance: float | None,
    device: torch.device,
    writer: ArchiveWriter,
) -> None:
    retention = settings.preserve
    if retention is None:
        retention = adaptive_retention(1.0 if importance is None else importance, *settings.retention_range)
    k = protected_count(retention, target.shape)
    constraint = settings.constraint or "double"
    weight = to_device(checkpoint.read_finite(target.name), target.transposed, device)
    if settings.basis == "random":
        found = random_directions(weight, constraint, k, f"{settings.seed} {target.name}")
    else:
        found = analyze_matrix(weight, constraint, k)
    record = replace(
        record,
        steps=found.staircase.steps,
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
    max_length = resolve_max_length(settings.max_length, architecture.max_positions)
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
    seed: int,
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    if not examples:
        return {}
    loaded = load_model(checkpoint, device, architecture)
    bar = progress(total=len(examples), desc="importance", unit="row")
    cosines = measure_cosines(loaded, targets, examples, seed, bar)
    bar.close()
    return normalize_importance(cosines)


def report_of(archive: Archive, checkpoint: Checkpoint) -> AnalyzeReport:
    """The table of an archive, per role in the order of the model."""
    return AnalyzeReport(
        output=archive.path,
        basis=archive.manifest.basis,
        constraint=archive.manifest.constraint,
        roles=summarize_roles(archive),
        archive_bytes=archive.num_bytes,
        checkpoint_bytes=checkpoint.num_bytes,
        not_targeted=archive.manifest.not_targeted,
        calibration=tuple(archive.manifest.tasks[0].details.get("calibration", ())),
        most_directions=max(
            side.directions for record in archive.values() for side in (record.output, record.input) if side is not None
        )
        if archive.manifest.source_weights
        else 0,
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
