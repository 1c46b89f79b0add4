"""`sculptor data`: what rows become for a model, before anything is trained on them."""

import itertools
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sculptor.checkpoint.architecture import Architecture, ModelKind, inspect_architecture
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.data.asking import tell_ends, tell_plain
from sculptor.data.chat import check_use, unread_keys
from sculptor.data.columns import Columns
from sculptor.data.examples import IGNORED, EncodedRow, Example, encode_row, mixture_of, resolve_max_length
from sculptor.data.labelled import classes_of
from sculptor.data.mixture import Mixture
from sculptor.data.rows import Data, DataSource, as_items, read_sources
from sculptor.errors import DataError
from sculptor.jobs.data_report import DataReport, ExamplePreview, RowPreview, SourcePreview
from sculptor.model.load import check_trainable, load_tokenizer
from sculptor.progress import Progress, silent


def preview(
    model: str | Path,
    data: Data,
    *,
    max_length: int | None = None,
    chat_template: str | None = None,
    columns: str | Columns | None = None,
    max_rows: int | None = None,
    rows: int = 3,
    progress: Progress = silent,
) -> DataReport:
    """What rows become for a checkpoint; reads its tokenizer and headers only.

    Args:
        model: a checkpoint directory or hub name.
        data: as `train` takes them.
        max_length: longest sequence in tokens; default 1024 or the model's limit.
        chat_template: for conversations: name of one of the tokenizer's templates, or a file; default its own.
        columns: our keys and their columns, `prompt=question,completion=answer` or a mapping.
        max_rows: rows to use of each of the data, the first ones; default all.
        rows: how many to show in full.
        progress: makes progress bars.

    Returns:
        How long the rows are in tokens, what is dropped or cut, and some of them as the model reads them.

    Raises:
        SculptorError: if the checkpoint or a row cannot be used.
    """
    if not as_items(data):
        raise DataError("no data: pass at least one file")
    checkpoint = open_checkpoint(model)
    architecture = inspect_architecture(checkpoint)
    check_trainable(checkpoint, architecture)
    return preview_rows(
        checkpoint, architecture, data, max_length=max_length, chat_template=chat_template, columns=columns, max_rows=max_rows,
        rows=rows, progress=progress,
    )[0]  # fmt: skip


def preview_rows(
    checkpoint: Checkpoint,
    architecture: Architecture,
    data: Data,
    *,
    max_length: int | None,
    chat_template: str | None,
    columns: str | Columns | None,
    max_rows: int | None,
    rows: int,
    progress: Progress,
) -> tuple[DataReport, list[int], Mixture | None]:
    """As `preview`, of an open checkpoint; the tokens of every sequence, and their shares of an epoch."""
    length = resolve_max_length(max_length, architecture.max_positions)
    sources = read_sources(data, max_rows, columns, classes=classes_of(architecture))
    found = [row for source in sources for row in source.rows]
    check_use(found, chat_template)
    tokenizer = load_tokenizer(checkpoint, architecture, chat_template)
    with closing(progress(total=len(found), desc="encode", unit="row")) as bar:
        encoded: list[EncodedRow] = []
        for row in found:
            encoded.append(encode_row(row, tokenizer, architecture.kind, length, architecture.vocab_size))
            bar.update(1)
    examples = [example for row in encoded for example in row.examples]
    remarks: list[str] = []
    tell_ends(found, tokenizer, remarks.append)
    tell_plain(found, tokenizer, remarks.append)
    parts = _divide(encoded, sources)
    mixture = mixture_of(sources, parts)
    counts = parts if mixture is None else list(mixture.counts)
    classes = architecture.classes
    report = DataReport(
        num_rows=len(found),
        num_examples=len(examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_learned=sum(map(_learned, examples)),
        num_dropped=sum(row.dropped for row in encoded),
        num_cut=sum(row.cut for row in encoded),
        num_split=sum(len(row.examples) > 1 for row in encoded),
        num_ended=sum(row.ended for row in encoded),
        num_rewritten=sum(row.rewritten for row in encoded),
        num_apart=sum(row.apart for row in encoded),
        num_epoch=sum(counts),
        longest=max((example.length for example in examples), default=0),
        max_length=length,
        sources=tuple(
            map(_describe, sources, (unread_keys(source.rows, tokenizer) for source in sources), parts, counts)
        ),
        rows=tuple(
            RowPreview(
                row.where,
                tuple(_preview(each, tokenizer, architecture.kind, classes) for each in made.examples),
                _remarks(made, length),
            )
            for row, made in zip(found[:rows], encoded[:rows], strict=True)
        ),
        remarks=tuple(remarks),
    )
    return report, [example.length for example in examples], mixture


def _divide(encoded: list[EncodedRow], sources: list[DataSource]) -> list[int]:
    """How many sequences each of the data makes."""
    rows = iter(encoded)
    return [sum(len(next(rows).examples) for _ in source.rows) for source in sources]


def _describe(source: DataSource, of_messages: dict[str, int], num_examples: int, num_epoch: int) -> SourcePreview:
    form = "; ".join(f"{count:,} x {form}" if len(source.forms) > 1 else form for form, count in source.forms.items())
    unread = (*source.unread, *(f"{key} of messages" for key in of_messages))
    return SourcePreview(source.name, len(source.rows), source.num_off, form, unread, num_examples, num_epoch)


def _learned(example: Example) -> int:
    return sum(label != IGNORED for label in example.labels)


def _preview(example: Example, tokenizer: Any, kind: ModelKind, classes: Sequence[str]) -> ExamplePreview:
    ids = example.input_ids
    apart = kind in ("seq2seq", "classifier")
    on = [False] * len(ids) if apart else [label != IGNORED for label in example.labels]
    edges = [0, *(i for i in range(1, len(ids)) if on[i] != on[i - 1]), len(ids)]
    parts = tuple((_text(tokenizer, ids, a, b), on[a]) for a, b in itertools.pairwise(edges))
    target = _text(tokenizer, example.labels, 0, len(example.labels)) if kind == "seq2seq" else None
    target = classes[example.labels[0]] if kind == "classifier" else target
    return ExamplePreview(parts, len(ids), _learned(example), target)


def _text(tokenizer: Any, ids: Sequence[int], start: int, stop: int) -> str:
    """What some of the tokens say where they stand: read alone, they lose the space that a word begins with."""
    before, whole, alone = (
        str(tokenizer.decode(part, clean_up_tokenization_spaces=False))
        for part in (ids[:start], ids[:stop], ids[start:stop])
    )
    return whole.removeprefix(before) if whole.startswith(before) else alone


def _remarks(row: EncodedRow, length: int) -> tuple[str, ...]:
    found = []
    if not row.examples:
        found.append(f"dropped: what carries loss does not fit into {length} tokens; raise --max-length")
    if row.cut:
        found.append(f"the middle of what comes before the loss was cut to fit into {length} tokens")
    if len(row.examples) > 1:
        found.append(f"{len(row.examples)} sequences: windows of a long text, or turns trained one by one")
    if row.apart:
        found.append("joined, prompt and completion would be tokenised in another way at their edge")
    if row.ended:
        found.append("an end of sequence was added: the chat template ends a turn with the start of the next")
    return tuple(found)
