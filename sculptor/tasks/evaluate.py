"""`sculptor.evaluate`: what a checkpoint makes of rows, of watched texts, and of tasks of lm-eval."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.configuration import check_attention
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.data.asking import tell_ends
from sculptor.data.chat import check_use, tell_unread, use_template
from sculptor.data.columns import Columns
from sculptor.data.examples import resolve_max_length
from sculptor.data.labelled import classes_of
from sculptor.data.rows import Data, Row, as_items, digest_rows, names_of, to_read_again
from sculptor.edits.settings import BankSettings
from sculptor.errors import SettingsError
from sculptor.evaluation.answers import tell_left_out
from sculptor.evaluation.harness import TaskResult, check_tasks, run_tasks
from sculptor.evaluation.rows import (
    NOTHING,
    Evaluation,
    Generation,
    Watched,
    check_finite,
    evaluate_rows,
    read_evaluation_rows,
)
from sculptor.jobs.bank_files import Bank
from sculptor.jobs.evaluate_request import EvaluateRequest
from sculptor.jobs.job import open_model
from sculptor.jobs.processes import check_alike, join
from sculptor.model.load import LoadedModel, check_head, resolve_device
from sculptor.model.room import PLANNED_ROWS, rows_at_once
from sculptor.progress import Progress, silent
from sculptor.tasks.routed import RoutedModel
from sculptor.training.settings import ReadOffload
from sculptor.world import World


def evaluate(
    model: str | Path,
    data: Data = (),
    *,
    base: str | Path | None = None,
    labels: Sequence[str] | None = None,
    watch: Data = (),
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    exact_match: bool | None = None,
    max_new_tokens: int | None = None,
    show: int = 0,
    columns: str | Columns | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    batch_size: int | None = None,
    attn_implementation: str | None = None,
    device: str = "auto",
    offload: ReadOffload = "auto",
    bank: str | Path | None = None,
    bank_top: int | None = None,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
) -> Evaluation:
    """Measures what a checkpoint can do.

    Args:
        model: a checkpoint directory or hub name.
        data: as `train` takes them, all of one kind of row.
        base: another checkpoint, for instance what the first was tuned from, that is measured likewise, without `bank`.
        labels: completions to rank; default the distinct completions of the rows, when there are at most 32.
        watch: further data, each by itself: one loss for each.
        tasks: tasks, groups or patterns of lm-eval.
        include_path: a folder of task files (YAML) beside lm-eval's own.
        num_fewshot: examples before each document of a task; default the task's own number.
        chat: ask tasks through the chat template.
        exact_match: generate greedily and compare; default for prompts without choices.
        max_new_tokens: of what is generated, at most; default as many as the longest expected answer has.
        show: how many answers to look at.
        columns: our keys and their columns, `prompt=question,completion=answer` or a mapping.
        max_rows: rows to use of each of the data, and documents of a task, the first ones; default all.
        max_length: longest sequence in tokens; default 1024 or the model's limit.
        chat_template: for conversations: name of one of the tokenizer's templates, or a file; default its own.
        batch_size: rows per forward; default 16, and on a GPU as many as go well.
        attn_implementation: eager, sdpa, ...; default transformers' choice.
        device: auto, cpu, cuda or cuda:N.
        offload: where the model's blocks wait that are not being computed: none, cpu, disk, or auto.
        bank: of the model; each row is answered by the tasks that it is nearest to.
        bank_top: how many of them, mixed; default the nearest alone.
        progress: makes progress bars.
        notice: told, in a line, what form of data was recognised.

    Returns:
        Losses in nats a token, shares from 0 to 1; what does not apply is None.

    Raises:
        SculptorError: if the checkpoint or the data cannot be used.
    """
    request = EvaluateRequest(
        model=model, data=to_read_again(data), labels=labels, watch=to_read_again(watch), tasks=tasks,
        include_path=include_path, num_fewshot=num_fewshot, chat=chat,
        generation=Generation(exact_match, max_new_tokens, show), columns=columns, max_rows=max_rows, max_length=max_length,
        chat_template=chat_template, batch_size=batch_size, attn_implementation=attn_implementation, device=device,
        offload=offload, bank=bank, bank_top=bank_top, progress=progress, notice=_each_once(notice),
    )  # fmt: skip
    request.check()
    opened_bank = None if bank is None else Bank(bank)
    world = join(device)
    request.check_world(world)
    if base is None:
        return _evaluate(request, opened_bank, world)
    other = replace(request, model=base, bank=None, bank_top=None)
    with world.together():  # what cannot be compared is told before anything is measured
        _check_comparable(request, other)
    found = _evaluate(request, opened_bank, world)
    return replace(found, base=_evaluate(other, None, world))


def _each_once(notice: Callable[[str], object]) -> Callable[[str], object]:
    """Tells each line once, whichever models it is about."""
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            notice(text)

    return tell


def _check_comparable(request: EvaluateRequest, other: EvaluateRequest) -> None:
    (_, one), (checkpoint, base) = (_open_checkpoint(each) for each in (request, other))
    if one.kind != base.kind:
        raise SettingsError(
            f"--base {checkpoint.path}: {base.model_class} does not do what {one.model_class} does; compare models of one kind"
        )


def _evaluate(request: EvaluateRequest, bank: Bank | None, world: World) -> Evaluation:
    """`evaluate` of what goes together; `bank` is the request's, opened."""
    with world.together():
        asked = _open(request, bank)
    if world.size > 1:
        others = asked.loaded.checkpoint.digests_beside((), request.progress)
        check_alike(world, {"rows": digest_rows(asked.every_row), "model": identity(others)})
    with closing(asked.loaded):
        return _measure(request, asked, world)


@dataclass(frozen=True, eq=False, slots=True)
class _Asked:
    """An opened model, and what it is measured on.

    Attributes:
        loaded: the model.
        rows: that it is asked about.
        texts: the watched ones, each with its name.
        manager: of lm-eval's tasks, where there are some.
        length: longest sequence in tokens.
        bank: whose tasks answer rows, if they do.
    """

    loaded: LoadedModel
    rows: Sequence[Row]
    texts: Sequence[tuple[str, Sequence[Row]]]
    manager: Any
    length: int
    bank: Bank | None

    @property
    def every_row(self) -> list[Row]:
        """Those of all files."""
        return [*self.rows, *(row for _, text in self.texts for row in text)]


def _open(request: EvaluateRequest, bank: Bank | None) -> _Asked:
    """Reads the rows, and then loads the model."""
    checkpoint, architecture = _open_checkpoint(request)
    rows, texts = _read(request, architecture)
    if not request.tasks:
        check_use([*rows, *(row for _, text in texts for row in text)], request.chat_template)
    include = None if request.include_path is None else Path(request.include_path)
    manager = check_tasks(request.tasks, include) if request.tasks else None
    length = resolve_max_length(request.max_length, architecture.max_positions)
    device, offload = resolve_device(request.device), request.offload
    if bank is not None:
        bank.check_base(checkpoint, request.progress)
        offload = "none"  # weights change from row to row
    tokens = (request.batch_size or PLANNED_ROWS) * length
    loaded = open_model(checkpoint, device, architecture, offload, tokens=tokens, progress=request.progress)
    return _Asked(loaded, rows, texts, manager, length, bank)


def _open_checkpoint(request: EvaluateRequest) -> tuple[Checkpoint, Architecture]:
    checkpoint = open_checkpoint(request.model, request.attn_implementation)
    check_attention(checkpoint)
    architecture = inspect_architecture(checkpoint)
    check_head(checkpoint, architecture)
    if architecture.kind == "classifier" and request.tasks:
        raise SettingsError(f"--tasks: for language models; {architecture.model_class} classifies sequences")
    return checkpoint, architecture


def _read(request: EvaluateRequest, architecture: Architecture) -> tuple[list[Row], list[tuple[str, list[Row]]]]:
    """Rows of the data, and of each watched text with its name."""
    given, watched, classes = as_items(request.data), as_items(request.watch), classes_of(architecture)
    columns, most, notice = request.columns, request.max_rows, request.notice
    rows = read_evaluation_rows(given, request.labels, columns, most, notice, classes=classes) if given else []
    texts = [
        read_evaluation_rows([item], None, columns, most, notice, all_renamed=not given, classes=classes)
        for item in watched
    ]
    return rows, list(zip(names_of(watched), texts, strict=True))


def _measure(request: EvaluateRequest, asked: _Asked, world: World) -> Evaluation:
    """All figures, of one model in memory."""
    loaded, length, progress = asked.loaded, asked.length, request.progress
    size = request.batch_size or rows_at_once(loaded, length)
    use_template(loaded.tokenizer, request.chat_template)
    tell_unread("rows", asked.every_row, loaded.tokenizer, request.notice)
    tell_ends(asked.every_row, loaded.tokenizer, request.notice)
    routed = None
    if asked.bank is not None:
        told = BankSettings(max_length=length, batch_size=size)
        routed = RoutedModel(asked.bank, loaded, request.bank_top or 1, told, progress)

    def measure(rows: Sequence[Row], labels: Sequence[str] | None, generation: Generation) -> Evaluation:
        if routed is not None:
            found = routed.evaluate(rows, labels, generation)
        else:
            found = evaluate_rows(
                loaded, rows, labels, length, size, generation=generation, progress=progress, world=world
            )
        check_finite(loaded.checkpoint.path, Path(rows[0].where.rpartition(":")[0]).name or "rows", found.loss)
        return found

    found = measure(asked.rows, request.labels, request.generation) if asked.rows else NOTHING
    if found.exact_match is not None or found.answers:
        tell_left_out(loaded, request.notice)
    watched = tuple(_watched(name, measure(text, None, Generation(exact_match=False))) for name, text in asked.texts)
    return replace(found, watched=watched, tasks=_ask_tasks(request, asked))


def _watched(name: str, found: Evaluation) -> Watched:
    assert found.loss is not None
    assert found.perplexity is not None
    return Watched(name, found.loss, found.perplexity, found.num_tokens)


def _ask_tasks(request: EvaluateRequest, asked: _Asked) -> tuple[TaskResult, ...]:
    """What lm-eval's tasks say, if any are asked."""
    if not request.tasks:
        return ()
    size = request.batch_size or PLANNED_ROWS  # lm-eval makes all logits of all rows, in float32
    return run_tasks(
        asked.loaded, request.tasks, asked.manager, max_length=asked.length, batch_size=size,
        max_rows=request.max_rows, num_fewshot=request.num_fewshot, chat=request.chat,
    )  # fmt: skip
