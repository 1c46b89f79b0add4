"""Figures row by row, so that a tuned model can be compared with its base in pairs.

The difference of two models on the same rows varies far less than each of them: rows that are hard are so for both. Its interval
is that of the mean of differences (`sculptor.numerics.ratio`).
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from sculptor.data.examples import encode
from sculptor.data.rows import CompletionRow, MessagesRow, Row, settle
from sculptor.errors import DataError
from sculptor.evaluation.answers import answer_rows, say
from sculptor.evaluation.ifeval import Check
from sculptor.evaluation.loss import each_loss
from sculptor.evaluation.ranking import RowScore, score_rows
from sculptor.evaluation.refusals import is_refusal
from sculptor.evaluation.rows import check_one_kind, labels_of
from sculptor.model.load import LoadedModel
from sculptor.numerics.ratio import Ratio, ratio_of_sums
from sculptor.progress import Progress

Figure = Literal["accuracy", "acc_norm", "exact_match", "loss", "refused", "followed", "instructions", "length"]


@dataclass(frozen=True, slots=True)
class Series:
    """One figure of one model: over rows, sums and what they are over."""

    figure: Figure
    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> Ratio:
        """The figure."""
        return ratio_of_sums(self.sums, self.counts)


@dataclass(frozen=True, slots=True)
class Reading:
    """How models are read; as the options of `evaluate`."""

    max_length: int
    batch_size: int
    max_new_tokens: int | None
    exact_match: bool | None


def change(base: Series, new: Series) -> Ratio:
    """What became of a figure, in pairs.

    Raises:
        DataError: if the two are not of the same rows and tokens.
    """
    if base.counts != new.counts:
        raise DataError(
            f"{base.figure}: base and tuned model read the same rows as other tokens; compare checkpoints of one "
            "tokenizer and chat template"
        )
    return ratio_of_sums([b - a for a, b in zip(base.sums, new.sums, strict=True)], base.counts)


def read_series(loaded: LoadedModel, rows: Sequence[Row], reading: Reading, progress: Progress) -> list[Series]:
    """All figures of rows of one kind, the one that matters first.

    Raises:
        DataError: if the rows cannot be read by this model.
    """
    talks = bool(loaded.tokenizer.chat_template)
    settled = [settle(row, talks) for row in rows]
    pairs = [row for row in settled if isinstance(row, CompletionRow)]
    if pairs:
        check_one_kind(len(pairs), len(rows), "are prompt and completion", rows[0].where)
        return _of_pairs(loaded, pairs, reading, progress)
    talked = [row for row in settled if isinstance(row, MessagesRow)]
    found = []
    if talked and reading.exact_match:
        check_one_kind(len(talked), len(rows), "are conversations", rows[0].where)
        with closing(progress(total=len(talked), desc="answer", unit="row")) as bar:
            answers = answer_rows(loaded, talked, reading.max_length, reading.max_new_tokens, reading.batch_size, bar)
        found.append(_of_rows("exact_match", [answer.exact for answer in answers]))
    return [*found, _loss(loaded, settled, reading, progress)]


def _loss(loaded: LoadedModel, rows: Sequence[Row], reading: Reading, progress: Progress) -> Series:
    """The unit is a sequence: a long text has several."""
    encoded = encode(rows, loaded.tokenizer, "causal", reading.max_length, loaded.architecture.vocab_size)
    with closing(progress(total=len(encoded.examples), desc="evaluate", unit="row")) as bar:
        sums, counts = zip(*each_loss(loaded, encoded.examples, reading.batch_size, bar), strict=True)
    return Series("loss", sums, counts)


def _of_pairs(loaded: LoadedModel, rows: Sequence[CompletionRow], reading: Reading, progress: Progress) -> list[Series]:
    choosing = sum(bool(row.choices) for row in rows)
    if choosing:
        check_one_kind(choosing, len(rows), "have choices", rows[0].where)
    labels = None if choosing else labels_of(rows, None)
    exact = reading.exact_match if reading.exact_match is not None else not choosing
    with closing(progress(total=len(rows), desc="evaluate", unit="row")) as bar:
        scores = score_rows(
            loaded, rows, labels or (), reading.max_length, reading.batch_size, bar, exact, reading.max_new_tokens
        )
    return [*_shares(scores), Series("loss", tuple(s.loss for s in scores), tuple(s.num_tokens for s in scores))]


def _shares(scores: Sequence[RowScore]) -> list[Series]:
    figures: dict[Figure, list[bool | None]] = {
        "accuracy": [score.ranked_right for score in scores],
        "acc_norm": [score.normalized_right for score in scores],
        "exact_match": [score.exact for score in scores],
    }
    return [_of_rows(name, found) for name, found in figures.items() if found[0] is not None]


def _of_rows(figure: Figure, found: Sequence[bool | None]) -> Series:
    return Series(figure, tuple(float(bool(each)) for each in found), (1,) * len(found))


def refusal_series(loaded: LoadedModel, prompts: Sequence[str], reading: Reading, progress: Progress) -> list[Series]:
    """How often a model refuses, and how much it says."""
    said = _said(loaded, prompts, reading, reading.max_new_tokens or min(64, reading.max_length // 2), progress)
    return [_of_rows("refused", [is_refusal(answer) for answer in said]), _length(said)]


def ifeval_series(
    loaded: LoadedModel, rows: Sequence[Mapping[str, Any]], check: Check, reading: Reading, progress: Progress
) -> list[Series]:
    """How often all instructions of a prompt are followed, how often one is, and how much is said."""
    longest = min(1280, reading.max_length * 3 // 4)  # as lm-eval's task has it
    said = _said(loaded, [str(row["prompt"]) for row in rows], reading, reading.max_new_tokens or longest, progress)
    return followed_series(rows, said, check)


def followed_series(rows: Sequence[Mapping[str, Any]], said: Sequence[str], check: Check) -> list[Series]:
    """`ifeval_series` of answers that were given."""
    followed = [check(row, answer) for row, answer in zip(rows, said, strict=True)]
    each = Series("instructions", tuple(float(sum(f)) for f in followed), tuple(map(len, followed)))
    return [_of_rows("followed", [all(f) for f in followed]), each, _length(said)]


def _length(said: Sequence[str]) -> Series:
    """Characters of an answer: a tuning on short answers ends all of them sooner, at hardly any change of most tokens."""
    return Series("length", tuple(float(len(answer)) for answer in said), (1,) * len(said))


def _said(loaded: LoadedModel, prompts: Sequence[str], reading: Reading, max_new: int, progress: Progress) -> list[str]:
    with closing(progress(total=len(prompts), desc="answer", unit="row")) as bar:
        return say(loaded, prompts, reading.max_length, max_new, reading.batch_size, bar)
