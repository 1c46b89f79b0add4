"""The opened and checked inputs of a job, with everything that follows from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.configuration import check_attention
from sculptor.checkpoint.directory import check_modules
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.checkpoint.records import read_record
from sculptor.checkpoint.vocabulary import Growth
from sculptor.data.asking import tell_ends, tell_plain
from sculptor.data.chat import check_use, tell_unread
from sculptor.data.examples import Encoded, encode, encode_sources, resolve_max_length
from sculptor.data.labelled import classes_of
from sculptor.data.mixture import Mixture
from sculptor.data.replay import Replay, with_replay
from sculptor.data.rows import Data, DataSource, as_items, digest_rows, names_of, read_rows, read_sources, task_name
from sculptor.errors import DataError, SettingsError
from sculptor.jobs.classification import check_task, head_of
from sculptor.jobs.harm import samples_for, with_measurements
from sculptor.jobs.new_tokens import check_old_text, grow_tokenizer, tell_unseen
from sculptor.jobs.replay import read_replay, steps_of
from sculptor.jobs.train_request import TrainRequest
from sculptor.methods.method import carries_of, measures_of
from sculptor.model.load import LoadedModel, check_head, load_model, load_streamed, load_tokenizer
from sculptor.model.protected import Protected, read_protected
from sculptor.model.samples import Samples, read_samples
from sculptor.planning.footprints import Workload, footprints
from sculptor.planning.placement import choose
from sculptor.progress import Progress, silent
from sculptor.training.openly import select_extra
from sculptor.training.rates import default_relative_rate
from sculptor.training.settings import EVIDENCE, Offload, ReadOffload, TrainSettings
from sculptor.training.steps import Steps

MEMORY_ROWS = 384


@dataclass(frozen=True, eq=False, slots=True)
class TrainJob:
    """Opened and checked inputs of a training.

    Attributes:
        settings: resolved.
        data: what records call them; `eval_data` those that choose the best parameters.
        rows_digest: of all rows, as they are in the files.
        encoded: the rows; `evaluation` those that choose the best parameters, if any.
        name: of the task.
        extra: openly trained parameter of the model -> tensor of the checkpoint.
        placement: where its blocks are, and why.
        unopened: the archive as it was given, where `archive` was opened for the task.
        rows_elsewhere: how many rows another program trained on, where `encoded` has only those that are measured.
        trainer: that program and its settings, if any.
        growth: its new tokens, if any.
        ungrown: the checkpoint as it was given, where `checkpoint` has got them, or a new head.
        samples: of the first base, that harm is measured on; None if the archive has none.
        named: what the archive keeps of texts that were protected by name.
        replays: what is mixed into the task's rows.
        steps: what they make of all these rows; None where another program makes them.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    archive: Archive
    settings: TrainSettings
    data: tuple[str, ...]
    rows_digest: str | None
    encoded: Encoded
    evaluation: Encoded | None
    name: str
    extra: Mapping[str, str]
    placement: str = ""
    unopened: Archive | None = None
    rows_elsewhere: int | None = None
    trainer: Mapping[str, Any] | None = None
    growth: Growth | None = None
    ungrown: Checkpoint | None = None
    samples: Samples | None = None
    named: tuple[Protected, ...] = ()
    replays: tuple[Replay, ...] = ()
    eval_data: tuple[str, ...] = ()
    steps: Steps | None = None

    @property
    def num_rows(self) -> int:
        """Rows that were trained on."""
        return len(self.encoded.examples) if self.rows_elsewhere is None else self.rows_elsewhere

    @property
    def base(self) -> Checkpoint:
        """The checkpoint as it was given."""
        return self.ungrown or self.checkpoint

    @property
    def of_steps(self) -> Encoded:
        """What steps are made of: the task's rows, and what is mixed in."""
        return with_replay(self.encoded, self.replays)


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """What is trained on, and what chooses the best parameters; as in `TrainJob`."""

    encoded: Encoded
    evaluation: Encoded | None
    digest: str | None
    growth: Growth | None = None
    replays: tuple[Replay, ...] = ()


def open_base(
    model: str | Path, attn_implementation: str | None = None, *, headed: bool = True
) -> tuple[Checkpoint, Architecture]:
    """The checkpoint that is trained, with which attention; unless it will get one, it has a head.

    Raises:
        SculptorError: if it cannot be.
    """
    checkpoint = open_checkpoint(model, attn_implementation)
    check_modules(checkpoint.path)
    check_attention(checkpoint)
    architecture = inspect_architecture(checkpoint)
    if headed:
        check_head(checkpoint, architecture)
    read_record(checkpoint.path)  # refuses a damaged one now: its lineage goes on in the output's
    return checkpoint, architecture


def open_job(
    request: TrainRequest,
    rows: Rows | None = None,
    new_head: tuple[Checkpoint, Sequence[str]] | None = None,
) -> TrainJob:
    """Opens and checks all that a training reads; `rows` if read before, `new_head`: the model as given, a new head's parameters.

    `request.subspaces` is its archive by now.

    Raises:
        SculptorError: if an input cannot be used, or a setting does not go with it.
    """
    assert request.subspaces is not None
    settings, notice = request.settings, request.notice
    checkpoint, architecture = open_base(request.model, settings.attn_implementation)
    archive = Archive(request.subspaces, rules=request.rules)
    archive.check_capacity()
    settings = resolve_settings(settings, archive)  # refuses before any work
    check_task(architecture, settings, request.replay)
    samples = samples_for(archive, architecture, settings)
    archive.check_base(checkpoint, request.progress)
    settings = replace(settings, max_length=resolve_max_length(settings.max_length, architecture.max_positions))
    rows = rows or read_task(
        checkpoint, architecture, request.data, request.eval_data, settings, notice, request.replay
    )
    settings = replace(settings, add_tokens=rows.growth.tokens if rows.growth else ())
    if rows.growth is not None:
        check_old_text(checkpoint, rows.growth, samples or read_samples(archive), settings.common_tokens, notice)
    if settings.select_rows is not None and rows.encoded.mixture is not None:
        raise SettingsError(
            "--select-rows with weights of the data: a choice among rows changes their shares; give one of the two"
        )
    items = as_items(request.data)
    job = TrainJob(
        checkpoint,
        architecture,
        archive,
        settings,
        names_of(items),
        rows.digest,
        rows.encoded,
        rows.evaluation,
        task_name(items[0]),
        {
            **head_of(checkpoint, architecture, () if new_head is None else new_head[1]),
            **select_extra(architecture, archive, settings.also_train),
        },
        growth=rows.growth,
        ungrown=None if new_head is None else new_head[0],
        samples=samples,
        named=read_protected(archive, architecture.vocab_size),
        replays=rows.replays,
        eval_data=names_of(as_items(request.eval_data)),
    )
    mixed = job.of_steps
    if rows.replays and settings.select_rows is None:  # else of fewer rows, which are not known yet
        notice(_replay_line(job, mixed))
    steps = steps_of(rows.encoded, rows.replays, settings)
    settings = steps.settings
    settings = with_measurements(settings, archive, steps, samples)
    return replace(job, settings=settings, steps=steps)


def _replay_line(job: TrainJob, trained: Encoded) -> str:
    assert trained.mixture is not None
    counts = trained.mixture.counts[-len(job.replays) :]
    parts = zip(counts, job.replays, strict=True)
    mixed = ", ".join(
        f"{count:,} from {replay.name} ({f'{len(replay.examples):,} rows' if replay.examples else 'others in each'})"
        for count, replay in parts
    )
    return f"an epoch takes {job.encoded.num_epoch:,} rows of the task and mixes in {mixed}"


def read_task(
    checkpoint: Checkpoint,
    architecture: Architecture,
    data: Data,
    eval_data: Data,
    settings: TrainSettings,
    notice: Callable[[str], object] = lambda _: None,
    replay: Data = (),
) -> Rows:
    """The rows of a task as tokens.

    Raises:
        SculptorError: if there are none, or they cannot be used.
    """
    tokenizer = load_tokenizer(checkpoint, architecture, settings.chat_template)
    growth = grow_tokenizer(tokenizer, checkpoint, settings.add_tokens)
    max_length = resolve_max_length(settings.max_length, architecture.max_positions)
    items = as_items(data)
    if not items:
        raise DataError("no data: pass at least one file")
    kind, size = architecture.kind, growth.after if growth else architecture.vocab_size
    classes = classes_of(architecture)
    sources = read_sources(items, settings.max_rows, settings.columns, notice, classes=classes)
    rows = [row for source in sources for row in source.rows]
    if not as_items(replay):  # else its conversations count, too
        check_use(rows, settings.chat_template)
    encoded = encode_sources(sources, tokenizer, kind, max_length, size)
    tell_ends(rows, tokenizer, notice)
    tell_plain(rows, tokenizer, notice)
    if encoded.num_rewritten:
        notice(
            f"{encoded.num_rewritten:,} of {len(rows):,} rows: the chat template says the assistant's turn otherwise than the row "
            "(white space before it, case, marks), and so it is learned; `sculptor data` shows it"
        )
    tell_unseen(growth, encoded.examples, notice)
    for source in sources:
        tell_unread(source.name, source.rows, tokenizer, notice)
    if encoded.mixture is not None:
        notice(_epoch_line(sources, encoded.mixture))
    evaluation = None
    eval_rows = read_rows(eval_data, None, settings.columns, notice, all_renamed=False, classes=classes)
    if eval_rows:
        evaluation = encode(eval_rows, tokenizer, kind, max_length, size)
        if (line := evaluation.says("--eval-data")) is not None:
            notice(line)
    replays = read_replay(replay, rows, tokenizer, architecture, max_length, settings, notice)
    return Rows(encoded, evaluation, digest_rows([*rows, *eval_rows]), growth, replays)


def _epoch_line(sources: Sequence[DataSource], mixture: Mixture) -> str:
    parts = zip(sources, mixture.counts, mixture.sizes, strict=True)
    return "an epoch takes " + ", ".join(f"{count:,} of {size:,} from {source.name}" for source, count, size in parts)


def resolve_settings(settings: TrainSettings, archive: Archive) -> TrainSettings:
    """The settings with the defaults that depend on the archive filled in.

    Raises:
        SettingsError: if the archive cannot go on like that, or a setting would have no effect.
    """
    method = archive.method
    rule = archive.manifest.settings.rule
    basis = f"an archive with {f'basis {method.terms.basis}' if rule == 'staircase' else f'rule {rule}'}"
    carries = carries_of(method)
    bayes = settings.optimizer == "bayes-adam"
    if bayes and (measures_of(method, "open") != "nothing" or not method.defaults.scaled):
        raise SettingsError(
            f"--optimizer bayes-adam does not go with {basis}: its coordinates are others in every task; use staircase or mask"
        )
    carry = settings.carry or ("keep" if bayes else carries[0])
    if carry not in carries:
        raise SettingsError(f"--carry {carry}: {basis} goes on by {' or '.join(carries)}")
    carried = measures_of(method, "carry", carry) != "nothing"
    measures = carried or measures_of(method, "open") != "nothing"
    weighs = carried and method.defaults.memory_weight is not None
    faults = {
        "--soften": bool(settings.soften) and method.defaults.soften is None,
        "--memory-rows": settings.memory_rows is not None and not measures,
        "--memory-weight": settings.memory_weight is not None and not weighs,
    }
    idle = [option for option, is_fault in faults.items() if is_fault]
    if idle:
        kept = carry == "keep" and measures_of(method, "carry", carries[0]) != "nothing"
        lacks = "adds up no moments" if measures else "has no moments; analyze with --basis inputs or curvature"
        how = "goes on by keep" if kept else lacks
        raise SettingsError(f"{', '.join(idle)} without effect: {basis} {how}")
    rate = None if settings.learning_rate is not None else default_relative_rate(archive)
    return replace(
        settings,
        carry=carry,
        evidence=(settings.evidence or EVIDENCE) if bayes else None,
        relative_rate=settings.relative_rate or rate,
        soften=(method.defaults.soften or 0.0) if settings.soften is None else settings.soften,
        memory_rows=(settings.memory_rows or MEMORY_ROWS) if measures else None,
        memory_weight=(settings.memory_weight or method.defaults.memory_weight) if weighs else None,
    )


def cast_to(settings: TrainSettings) -> torch.dtype | None:
    """Dtype of every tensor of the merged checkpoint; None if each keeps its own."""
    return None if settings.save_dtype == "keep" else getattr(torch, settings.save_dtype)


def read_offload(offload: Offload) -> ReadOffload:
    """How a training's model is read where nothing is trained yet, so that there are no bases to set apart."""
    return "auto" if offload == "bases" else offload


def open_model(
    checkpoint: Checkpoint,
    device: torch.device,
    architecture: Architecture,
    offload: ReadOffload,
    *,
    tokens: int = 2048,
    progress: Progress = silent,
) -> LoadedModel:
    """A model that is only read: resident, or streamed where it does not fit.

    Args:
        checkpoint: where the weights are.
        device: where to compute.
        architecture: of the checkpoint.
        offload: as for training.
        tokens: of a forward pass.
        progress: makes progress bars.

    Raises:
        SettingsError: if it does not fit.
    """
    plans = footprints(checkpoint, architecture, (), device, Workload(tokens, 1, keep_inputs=True))
    plan, _ = choose(plans, device, offload, checkpoint.path)
    if plan.offload in ("cpu", "disk"):
        return load_streamed(checkpoint, device, plan.offload, architecture, keep_inputs=True, progress=progress)
    return load_model(checkpoint, device, architecture)
