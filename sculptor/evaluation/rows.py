"""What a loaded model makes of rows: loss, perplexity, exact match and label ranking."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sculptor.data.examples import encode, resolve_max_length
from sculptor.data.rows import CompletionRow, Row, read_rows
from sculptor.errors import DataError, SettingsError
from sculptor.evaluation.loss import mean_loss
from sculptor.evaluation.ranking import score_rows
from sculptor.model.load import LoadedModel
from sculptor.progress import Progress

# With more distinct completions than this, they are answers, not labels.
MAX_IMPLIED_LABELS = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`; what does not apply is None.

    Attributes:
        loss: nats per token, over text, or completions with their end of sequence.
        perplexity: exp(loss).
        accuracy: share of rows whose own label ranks first.
        exact_match: share of rows whose completion greedy generation gives.
        num_rows: rows read; `num_tokens` tokens that the loss is over.
        labels: what was ranked.
    """

    loss: float
    perplexity: float
    accuracy: float | None
    exact_match: float | None
    num_rows: int
    num_tokens: int
    labels: tuple[str, ...] | None


def evaluate_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    max_length: int | None,
    batch_size: int,
    *,
    generate: bool,
    progress: Progress,
) -> Evaluation:
    """Measures rows of one kind; pairs of prompt and completion by ranking labels, too.

    Args:
        loaded: the model.
        rows: as `read_evaluation_rows` gives them.
        labels: completions to rank; default the distinct completions of the rows, when there are at most 32.
        max_length: longest sequence in tokens; default 1024 or the model's limit.
        batch_size: rows per forward.
        generate: measure exact match, by greedy generation.
        progress: makes progress bars.

    Raises:
        SettingsError: if the labels lack a completion.
    """
    length = resolve_max_length(max_length, loaded.architecture.max_positions)
    pairs = [row for row in rows if isinstance(row, CompletionRow)]
    if pairs and loaded.kind != "masked":
        return _evaluate_pairs(loaded, pairs, _labels(pairs, labels), length, batch_size, generate, progress)
    return _evaluate_loss(loaded, rows, length, batch_size, progress)


def read_evaluation_rows(data: Sequence[str | Path], labels: Sequence[str] | None) -> list[Row]:
    """Rows of one kind.

    Raises:
        DataError: if there are none, or of two kinds.
    """
    if not data:
        raise DataError("no data: pass at least one file")
    rows = read_rows(data)
    pairs = [row for row in rows if isinstance(row, CompletionRow)]
    if pairs and len(pairs) < len(rows):
        raise DataError(
            f"{len(pairs)} of {len(rows)} rows are prompt and completion; evaluate one kind of row at a time"
        )
    if labels is not None and not pairs:
        raise SettingsError("--labels without effect: only 'prompt' and 'completion' rows have labels")
    return rows


def _labels(rows: Sequence[CompletionRow], given: Sequence[str] | None) -> tuple[str, ...] | None:
    found = tuple(sorted({row.completion for row in rows}))
    if given is None:
        return found if len(found) <= MAX_IMPLIED_LABELS else None
    # A label is written as a person says it; the rows' completions may start with the space that follows a prompt.
    leading = all(text.startswith(" ") for text in found)
    chosen = tuple(dict.fromkeys(f" {text.strip()}" if leading else text for text in given))
    unused = [text for text in chosen if text not in found]
    foreign = [text for text in found if text not in chosen]
    if foreign:
        typo = f"; {unused[0]!r} is the completion of none" if unused else ""
        raise SettingsError(f"--labels lacks {foreign[0]!r}, the completion of some row{typo}; name every label")
    return chosen


def _evaluate_loss(
    loaded: LoadedModel, rows: Sequence[Row], length: int, batch_size: int, progress: Progress
) -> Evaluation:
    encoded = encode(rows, loaded.tokenizer, loaded.kind, length, loaded.architecture.vocab_size)
    bar = progress(total=len(encoded.examples), desc="evaluate", unit="row")
    loss, tokens = mean_loss(loaded, encoded.examples, batch_size, bar)
    bar.close()
    return Evaluation(loss, math.exp(min(loss, 700.0)), None, None, len(rows), tokens, None)


def _evaluate_pairs(
    loaded: LoadedModel,
    rows: Sequence[CompletionRow],
    labels: tuple[str, ...] | None,
    length: int,
    batch_size: int,
    generate: bool,
    progress: Progress,
) -> Evaluation:
    bar = progress(total=len(rows), desc="evaluate", unit="row")
    scores = score_rows(loaded, rows, labels or (), length, batch_size, bar, generate)
    bar.close()
    tokens = sum(score.num_tokens for score in scores)
    loss = sum(score.loss for score in scores) / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=sum(score.ranked_right or False for score in scores) / len(scores) if labels else None,
        exact_match=sum(score.exact or False for score in scores) / len(scores) if generate else None,
        num_rows=len(rows),
        num_tokens=tokens,
        labels=labels,
    )
