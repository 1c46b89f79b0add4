"""What is calibrated on: rows of files, a part of the tokens each, and text that the model says by itself."""

from collections.abc import Sequence
from pathlib import Path

from sculptor.analysis.evidence import Source
from sculptor.archive.manifest import SourceFacts
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.chat import check_use, use_template
from sculptor.data.examples import IGNORED, Example, encode, resolve_max_length
from sculptor.data.rows import read_rows
from sculptor.errors import SettingsError
from sculptor.methods.settings import SELF, AnalyzeSettings
from sculptor.model.load import LoadedModel, load_tokenizer
from sculptor.model.sampling import sample_examples
from sculptor.progress import Progress


def read_sources(checkpoint: Checkpoint, architecture: Architecture, settings: AnalyzeSettings) -> list[Source]:
    """One source per file, each with its part of the token budget; text that has yet to be sampled is none of them.

    Raises:
        SettingsError: if the settings do not go with the model.
        DataError: if a file cannot be used.
    """
    if settings.fisher == "sampled" and architecture.kind == "seq2seq":
        raise SettingsError("--fisher sampled: not for encoder-decoder models, whose decoder reads its own labels")
    max_length = resolve_max_length(settings.max_length, architecture.max_positions)
    tokenizer = load_tokenizer(checkpoint, architecture, settings.chat_template)
    files = {path: read_rows([path]) for path in settings.data if path != SELF}
    if not settings.chat:
        check_use([row for rows in files.values() for row in rows], settings.chat_template)
    sources = []
    for path, rows in files.items():
        found = encode(rows, tokenizer, architecture.kind, max_length, architecture.vocab_size).examples
        sources.append(Source(Path(path).name, spread(found, settings.tokens_per_source)))
    return sources


def sample_sources(loaded: LoadedModel, settings: AnalyzeSettings, progress: Progress) -> list[Source]:
    """What the model says by itself, where the settings ask for it.

    Raises:
        CheckpointError: if it cannot sample.
    """
    if SELF not in settings.data:
        return []
    max_length = resolve_max_length(settings.max_length, loaded.architecture.max_positions)
    use_template(loaded.tokenizer, settings.chat_template)
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


def facts_of(source: Source) -> SourceFacts:
    """What the archive says of a source."""
    labels = [label for example in source.examples for label in example.labels]
    return SourceFacts(
        source=source.name,
        rows=len(source.examples),
        tokens=sum(len(example.input_ids) for example in source.examples),
        tokens_with_loss=sum(label != IGNORED for label in labels),
    )
