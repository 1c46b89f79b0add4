"""What `preview` says of rows."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExamplePreview:
    """One sequence as the model sees it.

    Attributes:
        parts: runs of tokens as text, and whether they carry loss; in order.
        num_tokens: of all of them; `num_learned` of those with loss.
        target: the decoder's text, for an encoder-decoder; the class, for a classifier; None for others.
    """

    parts: tuple[tuple[str, bool], ...]
    num_tokens: int
    num_learned: int
    target: str | None = None


@dataclass(frozen=True, slots=True)
class RowPreview:
    """One row.

    Attributes:
        where: file and line.
        examples: what it becomes.
        remarks: what was done to it, and why.
    """

    where: str
    examples: tuple[ExamplePreview, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourcePreview:
    """One of several data.

    Attributes:
        name: as records call it.
        num_rows: rows read; `num_off` more say that they are not trained.
        form: what they were recognised as.
        unread: keys that nothing looks at.
        num_examples: sequences made of them; `num_epoch` of an epoch are from here.
    """

    name: str
    num_rows: int
    num_off: int
    form: str
    unread: tuple[str, ...]
    num_examples: int
    num_epoch: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """The result of `preview`.

    Attributes:
        num_rows: rows read; `num_examples` sequences made of them.
        num_tokens: read by the model in an epoch; `num_learned` of them carry loss.
        num_dropped: rows, or turns with a sequence of their own, whose completion does not fit.
        num_cut: rows that lost the middle of what comes before the loss.
        num_split: rows that became several sequences.
        num_ended: rows whose chat template gives turns no end, so that one was added.
        num_rewritten: rows of which the chat template says what is learned in other words.
        num_apart: rows whose prompt and completion, joined, would be tokenised in another way at their edge.
        num_epoch: sequences of an epoch, fewer than all with weights.
        longest: tokens of the longest sequence; `max_length` is what they were fitted into.
        sources: each of the data.
        rows: the first ones.
        remarks: what of answers' ends and languages is not as one would think.
    """

    num_rows: int
    num_examples: int
    num_tokens: int
    num_learned: int
    num_dropped: int
    num_cut: int
    num_split: int
    num_ended: int
    num_rewritten: int
    num_apart: int
    num_epoch: int
    longest: int
    max_length: int
    sources: tuple[SourcePreview, ...]
    rows: tuple[RowPreview, ...]
    remarks: tuple[str, ...]
