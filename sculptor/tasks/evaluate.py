"""`sculptor.evaluate`: what a checkpoint makes of rows, of watched texts, and of tasks of lm-eval."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.configuration import check_attention
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.data.chat import check_use, tell_unread, use_template
from sculptor.data.columns import Columns
from sculptor.data.examples import resolve_max_length
from sculptor.data.labelled import classes_of
from sculptor.data.rows import Data, Item, Row, as_items, digest_rows, names_of
from sculptor.edits.settings import BankSettings
from sculptor.errors import DataError, SettingsError
from sculptor.evaluation.harness import TaskResult, check_tasks, run_tasks
from sculptor.evaluation.rows import NOTHING, Evaluation, Generation, Watched, evaluate_rows, read_evaluation_rows
from sculptor.model.load import check_head, resolve_device
from sculptor.progress import Progress, silent
from sculptor.tasks.bank_files import Bank
from sculptor.tasks.job import open_model
from sculptor.tasks.processes import check_alike, join
from sculptor.tasks.routed import RoutedModel
from sculptor.training.settings import Offload
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
    batch_size: int = 16,
    attn_implementation: str | None = None,
    device: str = "auto",
    offload: Offload = "auto",
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
        batch_size: rows per forward.
        attn_implementation: eager, sdpa, ...; default transformers' choice.
        device: auto, cpu, cuda or cuda:N.
        offload: where the model's blocks wait that are not being computed: none, cpu, disk, or auto.
        bank: of the model; each row is answered by the tasks that it is nearest to.
        bank_top: how many of them, mixed; default the nearest alone.
        progress: makes progress bars.
        notice: told, in a line, what form of data was recognised.

    Raises:
        SculptorError: if the checkpoint or the data cannot be used.
    """
    for option, value in (
        ("--bank-top", bank_top),
        ("--batch-size", batch_size),
        ("--max-new-tokens", max_new_tokens),
        ("--max-rows", max_rows),
    ):
        if value is not None and value < 1:
            raise SettingsError(f"{option} {value}: expected at least 1")
    given, watched = _to_read_again(data), _to_read_again(watch)
    if not given and not watched and not tasks:
        raise DataError("nothing to measure: pass data, texts to watch, or tasks")
    _check_effect(
        {
            "--labels, --exact-match, --max-new-tokens and --show": not given
            and (labels is not None or exact_match is not None or max_new_tokens is not None or show > 0),
            "--include-path, --num-fewshot and --chat": not tasks
            and (include_path is not None or num_fewshot is not None or chat),
        }
    )
    opened = None if bank is None else Bank(bank)
    _check_bank(opened is not None, bank_top, tasks, offload)
    world = join(device)
    if opened is not None and world.size > 1:
        raise SettingsError(
            f"--bank with {world.size} processes: rows have models of their own; start it without a launcher"
        )
    if tasks and world.size > 1:
        raise SettingsError(f"--tasks with {world.size} processes: lm-eval runs in one; start it without a launcher")
    if base is not None:  # what cannot be compared is told before anything is measured
        with world.together():
            _check_base(model, base, attn_implementation, tasks)
    one = functools.partial(
        _evaluate, given=given, watched=watched, labels=labels, tasks=tasks, include_path=include_path,
        num_fewshot=num_fewshot, chat=chat, generation=Generation(exact_match, max_new_tokens, show), columns=columns,
        max_rows=max_rows, max_length=max_length, chat_template=chat_template, batch_size=batch_size,
        attn_implementation=attn_implementation, device=device, offload=offload, world=world, progress=progress,
        notice=_each_once(notice),
    )  # fmt: skip
    found = one(model, bank=opened, bank_top=bank_top)
    return found if base is None else replace(found, base=one(base, bank=None, bank_top=None))


def _to_read_again(data: Data) -> list[Item]:
    """Data as a list, of which nothing is used up by being read."""
    return [list(item) if isinstance(item, Iterator) else item for item in as_items(data)]


def _each_once(notice: Callable[[str], object]) -> Callable[[str], object]:
    """Tells each line once, whichever models it is about."""
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            notice(text)

    return tell


def _open(model: str | Path, attn_implementation: str | None, tasks: Sequence[str]) -> tuple[Checkpoint, Architecture]:
    checkpoint = open_checkpoint(model, attn_implementation)
    check_attention(checkpoint)
    architecture = inspect_architecture(checkpoint)
    check_head(checkpoint, architecture)
    if architecture.kind == "classifier" and tasks:
        raise SettingsError(f"--tasks: for language models; {architecture.model_class} classifies sequences")
    return checkpoint, architecture


def _check_base(model: str | Path, base: str | Path, attn_implementation: str | None, tasks: Sequence[str]) -> None:
    (_, one), (checkpoint, other) = (_open(path, attn_implementation, tasks) for path in (model, base))
    if one.kind != other.kind:
        raise SettingsError(
            f"--base {checkpoint.path}: {other.model_class} does not do what {one.model_class} does; compare models of one kind"
        )


def _evaluate(
    model: str | Path,
    *,
    given: list[Item],
    watched: list[Item],
    labels: Sequence[str] | None,
    tasks: Sequence[str],
    include_path: str | Path | None,
    num_fewshot: int | None,
    chat: bool,
    generation: Generation,
    columns: str | Columns | None,
    max_rows: int | None,
    max_length: int | None,
    chat_template: str | None,
    batch_size: int,
    attn_implementation: str | None,
    device: str,
    offload: Offload,
    bank: Bank | None,
    bank_top: int | None,
    world: World,
    progress: Progress,
    notice: Callable[[str], object],
) -> Evaluation:
    """`evaluate` of one model."""
    with world.together():
        checkpoint, architecture = _open(model, attn_implementation, tasks)
        classes = classes_of(architecture)
        rows = read_evaluation_rows(given, labels, columns, max_rows, notice, classes=classes) if given else []
        texts = [
            read_evaluation_rows([item], None, columns, max_rows, notice, all_renamed=not given, classes=classes)
            for item in watched
        ]
        read = [*rows, *(row for text in texts for row in text)]
        if not tasks:
            check_use(read, chat_template)
        manager = check_tasks(tasks, None if include_path is None else Path(include_path)) if tasks else None
        length = resolve_max_length(max_length, architecture.max_positions)
        where = resolve_device(device)
        if bank is not None:
            bank.check_base(checkpoint, progress)
            offload = "none"  # weights change from row to row
        loaded = open_model(checkpoint, where, architecture, offload, tokens=batch_size * length, progress=progress)
    if world.size > 1:
        check_alike(world, {"rows": digest_rows(read), "model": identity(checkpoint.digests_beside((), progress))})
    with closing(loaded):
        use_template(loaded.tokenizer, chat_template)
        tell_unread("rows", read, loaded.tokenizer, notice)
        found = NOTHING
        routed = None
        if bank is not None:
            told = BankSettings(max_length=length, batch_size=batch_size)
            routed = RoutedModel(bank, loaded, bank_top or 1, told, progress)

        def measure(rows: Sequence[Row], labels: Sequence[str] | None, generation: Generation) -> Evaluation:
            if routed is not None:
                return routed.evaluate(rows, labels, generation)
            return evaluate_rows(
                loaded, rows, labels, length, batch_size, generation=generation, progress=progress, world=world
            )

        if rows:
            found = measure(rows, labels, generation)
        alone = []
        for name, text in zip(names_of(watched), texts, strict=True):
            one = measure(text, None, Generation(exact_match=False))
            assert one.loss is not None
            assert one.perplexity is not None
            alone.append(Watched(name, one.loss, one.perplexity, one.num_tokens))
        results: tuple[TaskResult, ...] = ()
        if tasks:
            results = run_tasks(
                loaded, tasks, manager, max_length=length, batch_size=batch_size, max_rows=max_rows,
                num_fewshot=num_fewshot, chat=chat,
            )  # fmt: skip
    return replace(found, watched=tuple(alone), tasks=results)


def _check_bank(given: bool, top: int | None, tasks: Sequence[str], offload: Offload) -> None:
    if not given and top is not None:
        raise SettingsError("--bank-top without effect: there is no --bank")
    if given and tasks:
        raise SettingsError("--tasks with --bank: lm-eval asks one model; export a task with `sculptor bank export`")
    if given and offload in ("cpu", "disk"):
        raise SettingsError(f"--offload {offload} with --bank: weights change from row to row; use --offload none")


def _check_effect(unused: dict[str, bool]) -> None:
    for options, is_unused in unused.items():
        if is_unused:
            needed = "--data" if "--labels" in options else "--tasks"
            raise SettingsError(f"{options} without effect: there is no {needed}")
