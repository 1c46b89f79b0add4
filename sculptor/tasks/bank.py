"""`sculptor bank`: what tasks changed in one checkpoint, kept beside each other (SLM, arXiv 2404.07470).

JARe: W(x) = W0 + sum of w_i dW_i over the tasks that a row is nearest to. Each task is trained from the base, whatever by; what
it changed is kept in as few numbers as give it back. DTKR: `sculptor.numerics.routing`, by the model's own hidden states.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.directory import check_modules, published_name, tell_left_behind
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.staging import check_apart, one_pass, write_json
from sculptor.checkpoint.tensors import dtype_name
from sculptor.checkpoint.writer import write_checkpoint
from sculptor.data.columns import Columns
from sculptor.data.examples import resolve_max_length
from sculptor.data.rows import Data, Row, as_items, names_of, read_rows
from sculptor.edits.compact import Compact, compact
from sculptor.edits.pairs import open_pairs
from sculptor.edits.settings import BankSettings
from sculptor.errors import BankError, DataError, EditError
from sculptor.jobs.bank_files import BEGAN, Bank, BankTask, bank_to_add_to, base_identity, write_task
from sculptor.jobs.readme import Readme, code, write_readme
from sculptor.jobs.record import record_head
from sculptor.model.load import LoadedModel, load_model, resolve_device
from sculptor.model.queries import queries
from sculptor.model.room import rows_at_once
from sculptor.numerics.routing import make_key, mix, scores
from sculptor.progress import Progress, silent
from sculptor.training.settings import SaveDtype

Mix = tuple[tuple[str, float], ...]
_ROWS = 384  # of a task's, spread over all, that its key is of


@dataclass(frozen=True, slots=True)
class AddReport:
    """The result of `add_to_bank`.

    Attributes:
        bank: its directory.
        task: what was added.
        num_factored: how many of its tensors are kept as two factors.
        tasks: names of all tasks in the bank, in the order in which they came.
    """

    bank: Path
    task: BankTask
    num_factored: int
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Routed:
    """Where some rows went.

    Attributes:
        name: of the data.
        num_rows: how many rows there are.
        chosen: task -> how many of them are nearest to it.
    """

    name: str
    num_rows: int
    chosen: Mapping[str, int]


def add_to_bank(
    bank: str | Path,
    base: str | Path,
    tuned: str | Path,
    data: Data,
    *,
    name: str,
    rank: int | None = None,
    columns: str | Columns | None = None,
    settings: BankSettings | None = None,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
) -> AddReport:
    """Adds a task to a bank, which is made where there is none.

    Args:
        bank: its directory.
        base: the checkpoint that all of its tasks begin from: directory or hub name.
        tuned: what training made of it, or a LoRA adapter for it.
        data: rows of the task, as `train` takes them; its key is of some of them.
        name: of the task.
        rank: keep the leading directions of each matrix's difference alone; default as many as give it back to rounding.
        columns: our keys and their columns, `prompt=question,completion=answer` or a mapping.
        settings: how rows are read.
        progress: makes progress bars.
        notice: told, in a line, what form of data was recognised.

    Returns:
        What was added, and which tasks there are now.

    Raises:
        SculptorError: if an input cannot be used, or the bank has the task, or is of another checkpoint.
    """
    settings, directory = settings or BankSettings(), Path(bank).resolve()
    pairs = open_pairs(base, tuned, copy_base=True)
    check_apart(directory, [pairs.base.path, pairs.tuned.path])
    found = bank_to_add_to(directory, name)
    if re.fullmatch(r"[\w-]{1,100}", name) is None:
        raise BankError(f"--name {name!r}: expected letters, digits, - and _")
    if rank is not None and rank < 1:
        raise BankError(f"--rank {rank}: expected at least 1")
    rows = _spread(read_rows(data, None, columns, notice))
    if len(rows) < 2:
        raise DataError(f"{names_of(data)[0]}: {len(rows)} rows; a key needs at least two")
    identity = base_identity(pairs.base, progress)
    if found is not None and found.base != identity:
        raise BankError(f"{directory}: bank of another checkpoint than {pairs.base.path}; {BEGAN}")
    loaded = load_model(pairs.base, resolve_device(settings.device))
    key = make_key(read_queries(loaded, rows, settings, progress))
    with closing(progress(total=len(pairs.by_name), desc="add", unit="tensor")) as bar:
        deltas: dict[str, Compact] = {}
        squares = [0.0, 0.0]  # of what is left out, and of all
        for tensor in pairs.by_name:
            old, new = pairs.read(tensor, None, pairs.base[tensor])
            if not torch.equal(old, new):
                deltas[tensor] = compact(old, new, rank)
                difference = new.double() - old.double()
                squares[0] += float((difference - deltas[tensor].whole()).square().sum())
                squares[1] += float(difference.square().sum())
            bar.update(1)
    if not deltas:
        raise EditError(f"{pairs.tuned.path}: has the weights of {pairs.base.path}; there is nothing to add")
    kept = math.sqrt(max(0.0, 1 - squares[0] / squares[1]))
    tasks = write_task(directory, identity, name, key, deltas, kept)
    factored = sum(each.right is not None for each in deltas.values())
    return AddReport(directory, tasks[-1], factored, tuple(one.name for one in tasks))


def _spread(rows: list[Row]) -> list[Row]:
    """So many, from everywhere among them."""
    count = min(_ROWS, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def read_queries(loaded: LoadedModel, rows: list[Row], settings: BankSettings, progress: Progress) -> Tensor:
    """What rows are routed by.

    Raises:
        BankError: if the model is no decoder.
    """
    if loaded.kind != "causal":
        raise BankError(f"{loaded.checkpoint.path}: a bank is for decoders; this model is {loaded.kind}")
    length = resolve_max_length(settings.max_length, loaded.architecture.max_positions)
    with closing(progress(total=len(rows), desc="route", unit="row")) as bar:
        return queries(loaded, rows, length, settings.batch_size or rows_at_once(loaded, length), bar)


def route_rows(
    bank: Bank, loaded: LoadedModel, rows: list[Row], top: int, settings: BankSettings, progress: Progress
) -> list[Mix]:
    """Of each row the tasks that answer it, and their weights; the model has the base's weights.

    Raises:
        SculptorError: if a row does not fit.
    """
    found = read_queries(loaded, rows, settings, progress)
    names = bank.names
    return [tuple((names[i], weight) for i, weight in each) for each in mix(scores(found, bank.keys()), top)]


def route(
    bank: str | Path,
    model: str | Path,
    data: Data,
    settings: BankSettings | None = None,
    *,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
) -> list[Routed]:
    """Says which task each row goes to, for each of the data.

    Args:
        bank: its directory.
        model: the checkpoint that it is of.
        data: rows, as `train` takes them.
        settings: how rows are read.
        progress: makes progress bars.
        notice: told, in a line, what form of data was recognised.

    Returns:
        How many rows of each of the data went to which task.

    Raises:
        SculptorError: if an input cannot be used.
    """
    settings, opened, checkpoint = settings or BankSettings(), Bank(bank), open_checkpoint(model)
    items = as_items(data)
    parts = [read_rows([item], None, None, notice) for item in items]
    if not items:
        raise DataError("no data: pass at least one file")
    opened.check_base(checkpoint, progress)
    loaded = load_model(checkpoint, resolve_device(settings.device))
    together = route_rows(opened, loaded, [row for part in parts for row in part], 1, settings, progress)
    report, at = [], 0
    for name, part in zip(names_of(items), parts, strict=True):
        counts = Counter(each[0][0] for each in together[at : at + len(part)])
        report.append(Routed(name, len(part), {task: counts[task] for task in opened.names}))
        at += len(part)
    return report


def mixed(bank: Bank, mix: Mix, name: str, old: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the base with what tasks add, in float64, rounded once, to its own dtype unless to another."""
    total = old.to(torch.float64)
    for task, weight in mix:
        deltas = bank.deltas(task)
        if name in deltas.names:
            total = total + weight * deltas[name].whole()
    return total.to(dtype or old.dtype)


def export_task(
    bank: str | Path,
    model: str | Path,
    task: str,
    output: str | Path,
    *,
    save_dtype: SaveDtype = "keep",
    overwrite: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
) -> Path:
    """Writes the plain checkpoint of one task.

    Args:
        bank: its directory.
        model: the checkpoint that it is of.
        task: which.
        output: directory to write.
        save_dtype: dtype of the output; keep: that of the base, whatever the tuned checkpoint was in.
        overwrite: replace an existing output.
        progress: makes progress bars.
        notice: told, in a line, what looks like weights and does not go along, and what narrow dtype the output has.

    Returns:
        `output`.

    Raises:
        SculptorError: if an input cannot be used, or the output cannot be written.
    """
    opened, checkpoint, output = Bank(bank), open_checkpoint(model), Path(output).resolve()
    check_modules(checkpoint.path)
    tell_left_behind(checkpoint.path, checkpoint.files, notice)
    deltas = opened.deltas(task)
    check_apart(output, [opened.path, checkpoint.path])
    before = read_record(checkpoint.path)
    opened.check_base(checkpoint, progress)
    saved = None if save_dtype == "keep" else getattr(torch, save_dtype)
    narrow = sorted({dtype_name(d) for name in deltas if (d := checkpoint.infos[name].dtype).itemsize < 4})
    if saved is None and narrow:
        notice(
            f"what {task} changed is rounded to {', '.join(narrow)}, the base's dtype; --save-dtype float32 keeps more"
        )
    edits: dict[str, Any] = {name: partial(mixed, opened, ((task, 1.0),), name, dtype=saved) for name in deltas}
    with one_pass(output, command="bank export", overwrite=overwrite) as staged:
        with closing(progress(total=checkpoint.num_bytes, desc="write", unit="B")) as bar:
            write_checkpoint(checkpoint, staged, edits, dtype=saved, bar=bar)
        found = next(one for one in opened.tasks if one.name == task)
        facts = {"task": asdict(found), "base": {"name": published_name(checkpoint.path), "identity": opened.base}}
        lineage = {
            "lineage": list(map(asdict, before.lineage)),
            "also_trained": sorted({*before.also_trained, *deltas}),
        }
        write_json(staged / RECORD_NAME, record_head("bank export") | facts | lineage)
        write_readme(staged, _readme(checkpoint.path, found))
    return output


def _readme(base: Path, task: BankTask) -> Readme:
    return Readme(
        bases=(base,),
        done=f"with what {task.name} added",
        tags=("merge",),
        summary=f"{code(published_name(base))} with what the task {code(task.name)} of a bank added.",
        figures=[("tensors changed", f"{task.num_tensors:,}"), ("kept of the change", f"{100 * task.kept:.2f} %")],
    )
