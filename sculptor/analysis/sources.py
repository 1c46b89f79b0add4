"""What is calibrated on: rows of files, a part of the tokens each, and text that the model says by itself."""

import functools
from collections.abc import Sequence

from sculptor.analysis.endings import with_endings
from sculptor.analysis.evidence import Source
from sculptor.archive.manifest import SourceFacts
from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.asking import turn_end
from sculptor.data.chat import check_use, tell_unread, use_template
from sculptor.data.edges import NO_TOKEN
from sculptor.data.examples import IGNORED, Example, encode, no_embedding, resolve_max_length
from sculptor.data.labelled import classes_of
from sculptor.data.rows import Data, Notice, as_items, check_weights, read_sources, weight_of
from sculptor.errors import DataError, SettingsError
from sculptor.methods.settings import SAMPLED_LENGTH, SAMPLED_ROWS, SELF, AnalyzeSettings, is_self
from sculptor.model.load import LoadedModel, load_tokenizer
from sculptor.model.sampling import sample_examples, template_tokens
from sculptor.progress import Progress

# Of what a chat model says, what it says outside of conversations: what it knows of other text is not all used in these.
TEXT_SHARE = 0.25


def calibration_sources(
    checkpoint: Checkpoint, architecture: Architecture, settings: AnalyzeSettings, data: Data, notice: Notice
) -> list[Source]:
    """One source for each of the data, with its part of the token budget; text that has yet to be sampled is none of them.

    Raises:
        SettingsError: if the settings do not go with the model.
        DataError: if a file cannot be used.
    """
    if settings.fisher == "sampled" and architecture.kind == "seq2seq":
        raise SettingsError("--fisher sampled: not for encoder-decoder models, whose decoder reads its own labels")
    max_length = resolve_max_length(settings.max_length, architecture.max_positions)
    tokenizer = load_tokenizer(checkpoint, architecture, settings.chat_template)
    items = [item for item in as_items(data) if not (isinstance(item, str) and is_self(item))]
    scale = _scale(data)
    classes = classes_of(architecture, needed=settings.resolved_basis == "curvature" and settings.fisher == "true")
    read = []
    if items:
        read = read_sources(
            items, settings.max_rows, settings.columns, notice, mixed=scale is not None, classes=classes
        )
    if not settings.chat:
        check_use([row for source in read for row in source.rows], settings.chat_template)
    sources = []
    for source in read:
        found = encode(source.rows, tokenizer, architecture.kind, max_length, architecture.vocab_size).examples
        tell_unread(source.name, source.rows, tokenizer, notice)
        weight = 1.0 if scale is None or source.weight is None else source.weight * scale
        sources.append(Source(source.name, spread(found, settings.tokens_per_source), weight))
    return sources


def _scale(data: Data) -> float | None:
    """What makes the weights of all data 1 on average, as they are without; None if there are none.

    Raises:
        SettingsError: if some have weights and some have none, or one alone has.
    """
    weights = check_weights(data)
    return None if weights is None else len(weights) / sum(weights)


def sample_sources(loaded: LoadedModel, settings: AnalyzeSettings, data: Data, progress: Progress) -> list[Source]:
    """What the model says by itself, where the settings ask for it.

    Raises:
        CheckpointError: if it cannot sample.
        DataError: if what ends its answers is no token of the model's.
    """
    own = next((item for item in as_items(data) if isinstance(item, str) and is_self(item)), None)
    if own is None:
        return []
    max_length = resolve_max_length(settings.max_length, loaded.architecture.max_positions)
    use_template(loaded.tokenizer, settings.chat_template)
    if settings.max_length is None:  # a template's tokens are not the model's
        aside = template_tokens(loaded) if settings.chat and loaded.tokenizer.chat_template else 0
        max_length = min(max_length, sampled_length(settings.tokens_per_source) + aside)
    told = round(TEXT_SHARE * settings.tokens_per_source) if settings.chat else 0
    sample = functools.partial(sample_examples, loaded, seed=settings.seed, progress=progress)
    examples = sample(settings.tokens_per_source - told, max_length, chat=settings.chat)
    end, size = turn_end(loaded.tokenizer), loaded.architecture.vocab_size
    if settings.chat and end >= size:
        raise DataError(f"{loaded.checkpoint.path}: {no_embedding(end, size)}")
    if settings.chat and end != NO_TOKEN:
        examples = tuple(with_endings(example, end) for example in examples)
    if told > 1:
        examples += sample(told, max_length, chat=False, name="sample text")
    scale, weight = _scale(data), weight_of(own)
    return [Source(SELF, examples, 1.0 if scale is None or weight is None else weight * scale)]


def sampled_length(num_tokens: int) -> int:
    """Longest sequence that a model says, unless it is said: of few tokens they are shorter, and more."""
    least, most = SAMPLED_LENGTH
    return min(max(num_tokens // SAMPLED_ROWS, least), most)


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
        protects=source.protects or None,
        weight=source.weight,
    )
