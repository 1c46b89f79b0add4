"""What calibration leaves in an archive: the moments of what a model knows, and of every task it has learned."""

from collections.abc import Sequence
from dataclasses import replace

from sculptor.analysis.factors import Source, decide_staircases, derive_factors, least_budget
from sculptor.analysis.settings import SELF, AnalyzeSettings
from sculptor.archive.manifest import Added, MatrixRecord
from sculptor.archive.store import Archive
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Architecture, Target
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.examples import Example, encode, resolve_max_length
from sculptor.data.rows import read_rows
from sculptor.errors import DataError, SettingsError
from sculptor.model.load import LoadedModel, load_tokenizer
from sculptor.model.sampling import sample_examples
from sculptor.progress import Progress


def read_sources(
    checkpoint: Checkpoint, architecture: Architecture, targets: Sequence[Target], settings: AnalyzeSettings
) -> list[Source]:
    """One source per file, each with its part of the token budget; text that has yet to be sampled is none of them.

    Raises:
        SettingsError: if the settings do not go with the model or with each other.
        DataError: if a file cannot be used.
    """
    least = least_budget(targets, settings)
    if settings.free_budget < least - 1e-9:
        raise SettingsError(
            f"--budget {settings.free_budget}: with --keep {settings.keep}, a share of {least:.3f} stays free at least; "
            "keep more or free more"
        )
    if settings.fisher == "sampled" and architecture.kind == "seq2seq":
        raise SettingsError("--fisher sampled: not for encoder-decoder models, whose decoder reads its own labels")
    max_length = resolve_max_length(settings.max_length, architecture.max_positions)
    tokenizer = load_tokenizer(checkpoint, architecture.kind)
    sources = []
    for path in (path for path in settings.data if path != SELF):
        found = encode(read_rows([path]), tokenizer, architecture.kind, max_length, architecture.vocab_size).examples
        sources.append(Source(path, spread(found, settings.tokens_per_source)))
    return sources


def sample_sources(loaded: LoadedModel, settings: AnalyzeSettings, progress: Progress) -> list[Source]:
    """What the model says by itself, where the settings ask for it.

    Raises:
        CheckpointError: if it cannot sample.
    """
    if SELF not in settings.data:
        return []
    max_length = resolve_max_length(settings.max_length, loaded.architecture.max_positions)
    examples = sample_examples(
        loaded, settings.tokens_per_source, max_length, chat=settings.chat, seed=settings.seed, progress=progress
    )
    return [Source(SELF, examples)]


def spread(examples: Sequence[Example], num_tokens: int) -> tuple[Example, ...]:
    """Examples evenly over all of them, up to a number of tokens; at least one."""
    total = sum(example.length for example in examples)
    if total <= num_tokens:
        return tuple(examples)
    return spread_rows(examples, max(1, round(len(examples) * num_tokens / total)))


def spread_rows(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """`count` examples evenly over all of them; all, if there are no more."""
    count = min(len(examples), count)
    return tuple(examples[(2 * i + 1) * len(examples) // (2 * count)] for i in range(count))


def write_factors(
    loaded: LoadedModel,
    records: Sequence[MatrixRecord],
    targets: Sequence[Target],
    sources: Sequence[Source],
    settings: AnalyzeSettings,
    writer: ArchiveWriter,
    previous: Archive | None,
    progress: Progress,
) -> None:
    """Measures every matrix that the writer does not have yet and adds it; the steps are `settle`d afterwards.

    Raises:
        DataError: if the moments are not finite.
    """
    by_name = {record.name: record for record in records}
    # Whole blocks: an input that several matrices read may be weighed by the gradients of all of them.
    missing = {target.block for target in targets if target.name not in writer.records}
    todo = [target for target in targets if target.block in missing]
    if not todo:
        return
    done = set(writer.records)
    try:
        for found in derive_factors(loaded, todo, sources, settings, previous, progress):
            if found.target.name in done:
                continue
            record = by_name[found.target.name]
            outputs = found.output.factor.values.numel() if found.output else 0
            added = (Added(0, outputs, found.input.factor.values.numel()),)
            writer.add_factors(
                replace(record, traces=(*record.traces, *found.traces), added=added),
                (found.output.factor, found.output.profiles) if found.output else None,
                (found.input.factor, found.input.profiles),
            )
    except ValueError as cause:
        raise DataError(f"{loaded.checkpoint.path}: calibration failed ({cause}); look at --data") from cause


def settle(writer: ArchiveWriter, settings: AnalyzeSettings, weights: Sequence[float]) -> None:
    """Gives every matrix its staircase, now that all eigenvalues are known.

    Args:
        writer: holds all matrices.
        settings: budget, steps, threshold.
        weights: of the sources so far.
    """
    records = writer.all_records()
    sides = [side for record in records for side in (record.output, record.input) if side is not None]
    values = {side.values: writer.read(side.values) for side in sides if side.values is not None}
    for record in decide_staircases(records, values, settings, weights):
        writer.update(record)
