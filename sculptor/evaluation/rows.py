"""What a loaded model makes of rows: loss, perplexity, exact match, ranking of labels or choices, answers to look at."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from sculptor.data.columns import Columns
from sculptor.data.examples import encode, resolve_max_length
from sculptor.data.labelled import Classes
from sculptor.data.rows import CompletionRow, Data, MessagesRow, Notice, Row, as_items, read_rows, settle
from sculptor.errors import CheckpointError, DataError, SettingsError
from sculptor.evaluation.answers import Answer, answer_rows
from sculptor.evaluation.harness import TaskResult
from sculptor.evaluation.loss import classify, mean_loss
from sculptor.evaluation.ranking import score_rows
from sculptor.model.load import LoadedModel
from sculptor.model.room import rows_at_once
from sculptor.progress import Progress
from sculptor.world import ALONE, World

# With more distinct completions than this, they are answers, not labels.
MAX_IMPLIED_LABELS = 32


@dataclass(frozen=True, slots=True)
class Generation:
    """What is generated, and what for.

    Attributes:
        exact_match: measure it; None for prompts without choices alone.
        answers: with None, measure it of conversations, too.
        max_new_tokens: of an answer, at most; default as many as the longest that is expected.
        show: answers to look at, those of the first rows.
    """

    exact_match: bool | None = None
    max_new_tokens: int | None = None
    show: int = 0
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Watched:
    """The loss on one of the watched texts.

    Attributes:
        name: of the text.
        loss: nats a token; `perplexity` exp(loss).
        num_tokens: that the loss is over.
    """

    name: str
    loss: float
    perplexity: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`; what does not apply is None.

    Attributes:
        loss: nats per token, over text, or completions with their end of sequence; nats per row of a classifier.
        perplexity: exp(loss).
        accuracy: share of rows whose own label, right choice or class ranks first.
        acc_norm: the same of choices, by log-probability per character.
        exact_match: share of rows of which greedy generation gives a right answer.
        num_rows: rows read; `num_tokens` tokens, or rows of a classifier, that the loss is over.
        num_dropped: of the rows, those that did not fit and were not measured; `num_cut` lost a part of their prompt, or text.
        classified: by a classifier's head.
        base: the same of the model that it is compared with, if any.
        labels: what was ranked for all rows, or the classes.
        answers: the first ones.
        watched: a figure for each of the watched texts.
        tasks: figures of lm-eval.
        routed: with a bank, how many rows each of its tasks answered, as the nearest.
    """

    loss: float | None
    perplexity: float | None
    accuracy: float | None
    exact_match: float | None
    num_rows: int
    num_tokens: int
    labels: tuple[str, ...] | None
    acc_norm: float | None = None
    answers: tuple[Answer, ...] = ()
    watched: tuple[Watched, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    num_dropped: int = 0
    num_cut: int = 0
    routed: Mapping[str, int] = field(default_factory=dict)
    classified: bool = False
    base: "Evaluation | None" = None


NOTHING = Evaluation(None, None, None, None, 0, 0, None)


def evaluate_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    max_length: int | None,
    batch_size: int | None,
    *,
    generation: Generation,
    progress: Progress,
    world: World = ALONE,
) -> Evaluation:
    """Measures rows of one kind; pairs of prompt and completion by ranking labels or choices, too.

    Args:
        loaded: the model.
        rows: as `read_evaluation_rows` gives them.
        labels: completions to rank; default the distinct completions of the rows, when there are at most 32.
        max_length: longest sequence in tokens; default 1024 or the model's limit.
        batch_size: rows per forward; None for as many as go well.
        generation: what to generate.
        progress: makes progress bars.
        world: the processes that divide the rows; all get the same figures.

    Raises:
        SettingsError: if the labels lack a completion, or a setting would have no effect.
    """
    length = resolve_max_length(max_length, loaded.architecture.max_positions)
    batch_size = batch_size or rows_at_once(loaded, length)
    if loaded.kind == "classifier":
        if labels is not None or generation.exact_match or generation.max_new_tokens is not None or generation.show:
            raise SettingsError(
                "--labels, --exact-match, --max-new-tokens and --show without effect: a classifier has classes, and says no text"
            )
        return _evaluate_classes(loaded, rows, length, batch_size, progress, world)
    talks = bool(loaded.tokenizer.chat_template) and loaded.kind == "causal"
    rows = [settle(row, talks) for row in rows]
    pairs = [row for row in rows if isinstance(row, CompletionRow)]
    if pairs and loaded.kind != "masked":
        check_one_kind(len(pairs), len(rows), "are prompt and completion", rows[0].where)
        choosing = sum(bool(row.choices) for row in pairs)
        if choosing:
            check_one_kind(choosing, len(rows), "have choices", rows[0].where)
        ranked = None if choosing else labels_of(pairs, labels)
        return _evaluate_pairs(loaded, pairs, ranked, length, batch_size, generation, progress, world)
    found = _evaluate_loss(loaded, rows, length, batch_size, progress, world)
    talked = [row for row in rows if isinstance(row, MessagesRow)]
    wanted = generation.exact_match
    if wanted is None:
        wanted = generation.answers and loaded.kind == "causal" and len(talked) == len(rows)
    if not wanted and not generation.show:
        return found
    if not talked or loaded.kind != "causal":
        raise SettingsError("--exact-match and --show without effect: nothing is answered in 'text' rows")
    check_one_kind(len(talked), len(rows), "are conversations", rows[0].where)
    answered = talked if wanted else talked[: generation.show]
    with closing(progress(total=len(world.share(answered)), desc="answer", unit="row")) as bar:
        answers = answer_rows(loaded, answered, length, generation.max_new_tokens, batch_size, bar, world)
    exact = sum(answer.exact for answer in answers) / len(answers) if wanted else None
    return replace(found, exact_match=exact, answers=tuple(answers[: generation.show]))


def read_evaluation_rows(
    data: Data,
    labels: Sequence[str] | None,
    columns: str | Columns | None = None,
    max_rows: int | None = None,
    notice: Notice = lambda _: None,
    *,
    all_renamed: bool = True,
    classes: Classes | None = None,
) -> list[Row]:
    """Rows of one kind.

    Raises:
        DataError: if there are none, or of two kinds.
    """
    if not as_items(data):
        raise DataError("no data: pass at least one file")
    rows = read_rows(data, max_rows, columns, notice, all_renamed=all_renamed, classes=classes)
    pairs = [row for row in rows if isinstance(row, CompletionRow)]
    if pairs:
        check_one_kind(len(pairs), len(rows), "are prompt and completion", rows[0].where)
    if classes is None and labels is not None and (not pairs or any(row.choices for row in pairs)):
        raise SettingsError("--labels without effect: only 'prompt' and 'completion' rows without choices have labels")
    return rows


def check_one_kind(count: int, total: int, what: str, first: str) -> None:
    """Refuses rows of which only some are of a kind.

    Raises:
        DataError: saying how many, and where the first of all is.
    """
    if count < total:
        raise DataError(
            f"{first}: of this and other rows {count} of {total} {what}; evaluate one kind of row at a time"
        )


def check_finite(path: Path, what: str, figure: float | None) -> None:
    """Refuses a figure that is no number: every other figure of such a model means nothing, either.

    Raises:
        CheckpointError: with the model and what it was measured on.
    """
    if figure is not None and not math.isfinite(figure):
        raise CheckpointError(f"{path}: predicts no numbers on {what} ({figure}); it cannot be measured")


def labels_of(rows: Sequence[CompletionRow], given: Sequence[str] | None) -> tuple[str, ...] | None:
    """What is ranked for all rows; None if they have more distinct completions than labels are, or one, which ranks nothing.

    Raises:
        SettingsError: if the labels that are given lack one.
    """
    found = tuple(sorted({row.completion for row in rows}))
    if given is None:
        return found if 1 < len(found) <= MAX_IMPLIED_LABELS else None
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
    loaded: LoadedModel, rows: Sequence[Row], length: int, batch_size: int, progress: Progress, world: World
) -> Evaluation:
    encoded = encode(rows, loaded.tokenizer, loaded.kind, length, loaded.architecture.vocab_size)
    with closing(progress(total=len(world.share(encoded.examples)), desc="evaluate", unit="row")) as bar:
        loss, tokens = mean_loss(loaded, encoded.examples, batch_size, bar, world)
    return Evaluation(
        loss, math.exp(min(loss, 700.0)), None, None, len(rows), tokens, None,
        num_dropped=encoded.num_dropped, num_cut=encoded.num_cut,
    )  # fmt: skip


def _evaluate_classes(
    loaded: LoadedModel, rows: Sequence[Row], length: int, batch_size: int, progress: Progress, world: World
) -> Evaluation:
    encoded = encode(rows, loaded.tokenizer, loaded.kind, length, loaded.architecture.vocab_size)
    with closing(progress(total=len(world.share(encoded.examples)), desc="evaluate", unit="row")) as bar:
        loss, accuracy = classify(loaded, encoded.examples, batch_size, bar, world)
    return Evaluation(
        loss, math.exp(min(loss, 700.0)), accuracy, None, len(rows), len(rows), loaded.architecture.classes,
        num_cut=encoded.num_cut, classified=True,
    )  # fmt: skip


def _evaluate_pairs(
    loaded: LoadedModel,
    rows: Sequence[CompletionRow],
    labels: tuple[str, ...] | None,
    length: int,
    batch_size: int,
    generation: Generation,
    progress: Progress,
    world: World,
) -> Evaluation:
    choosing = bool(rows[0].choices)
    exact = generation.exact_match if generation.exact_match is not None else not choosing
    with closing(progress(total=len(world.share(rows)), desc="evaluate", unit="row")) as bar:
        asked = exact or generation.show > 0
        scores = score_rows(
            loaded, rows, labels or (), length, batch_size, bar, asked, generation.max_new_tokens, world
        )
    tokens = sum(score.num_tokens for score in scores)
    loss = sum(score.loss for score in scores) / tokens
    shown = list(zip(rows, scores, strict=True))[: generation.show]
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=_share(score.ranked_right for score in scores) if labels or choosing else None,
        exact_match=_share(score.exact for score in scores) if exact else None,
        num_rows=len(rows),
        num_tokens=tokens,
        labels=labels,
        acc_norm=_share(score.normalized_right for score in scores) if choosing else None,
        answers=tuple(
            Answer(row.where, row.prompt, row.completion.strip(), score.said or "", bool(score.exact))
            for row, score in shown
        ),
        num_cut=sum(score.cut for score in scores),
    )


def _share(found: Iterable[bool | None]) -> float:
    listed = [bool(item) for item in found]
    return sum(listed) / len(listed)
