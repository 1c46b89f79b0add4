"""`sculptor.card`: tuned models beside their base, with intervals, and whether they may be released."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.configuration import check_attention
from sculptor.checkpoint.directory import published_name
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.chat import use_template
from sculptor.data.columns import Columns
from sculptor.data.examples import resolve_max_length
from sculptor.data.rows import Data
from sculptor.errors import CheckpointError, DataError, SettingsError
from sculptor.evaluation.refusals import PHRASES
from sculptor.evaluation.rows import check_finite
from sculptor.evaluation.series import Figure, Reading, Series, change
from sculptor.jobs.card_report import (
    HARMS,
    LEAK,
    RESERVED,
    UNVERIFIED,
    CardReport,
    Leak,
    Line,
    TunedCard,
    check_known,
    failures,
    interval,
    parse_threshold,
)
from sculptor.jobs.harm import need_samples
from sculptor.jobs.job import open_model
from sculptor.jobs.measures import Measure, read_measures
from sculptor.methods.kinds import Kinds
from sculptor.model.harm import Harm, NamedHarm, measure_harm
from sculptor.model.load import LoadedModel, check_head, resolve_device
from sculptor.model.protected import measure_protected, read_protected
from sculptor.model.room import PLANNED_ROWS, rows_at_once
from sculptor.model.samples import SECTION, Sample, draw_samples
from sculptor.progress import Progress, silent
from sculptor.tasks.verify import verify
from sculptor.training.settings import ReadOffload

_SEED = 0
_KEPT = 512  # tokens of each prediction of the base, where samples are drawn here


def card(
    base: str | Path,
    tuned: Sequence[str | Path],
    data: Data = (),
    *,
    abilities: Sequence[str | Path] = (),
    watch: Data = (),
    subspaces: str | Path | None = None,
    fail_if: Sequence[str] = (),
    strict: bool = False,
    exact_match: bool | None = None,
    max_new_tokens: int | None = None,
    columns: str | Columns | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    offload: ReadOffload = "auto",
    rules: Kinds | None = None,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
) -> CardReport:
    """Measures a base and what was made of it on the same rows, in pairs.

    Args:
        base: a checkpoint directory or hub name; a causal model.
        tuned: one or several checkpoints made of it.
        data: the tasks that were taught, as `evaluate` takes rows.
        abilities: files of rows, or folders of such files: choices, prompts with completions, prompts alone (refusals), IFEval.
        watch: texts whose loss is watched.
        subspaces: an archive of the base: its samples for harm, and the leak that `verify` measures.
        fail_if: thresholds, `NAME<VALUE`, `NAME>VALUE` or `unverified`.
        strict: hold the worse end of the 95 % interval against them, not the figure itself.
        exact_match: generate greedily and compare; default for prompts without choices.
        max_new_tokens: of what is generated, at most; default by what is asked: see docs/release.md.
        columns: our keys and their columns, for `data`.
        max_rows: rows to use of each file, the first ones; default all.
        max_length: longest sequence in tokens; default 1024 or the model's limit.
        chat_template: for conversations: name of one of the tokenizer's templates, or a file; default its own.
        batch_size: rows per forward; default 16, and on a GPU as many as go well.
        device: auto, cpu, cuda or cuda:N.
        offload: where the model's blocks wait that are not being computed: none, cpu, disk, or auto.
        rules: kinds of rules beside sculptor's own.
        progress: makes progress bars.
        notice: told, in a line, what is left out, and what form of data was recognised.

    Returns:
        Every figure before and after with its interval, and whether all thresholds are satisfied.

    Raises:
        SculptorError: if an input cannot be used, or a threshold names nothing that is measured.
    """
    if not tuned:
        raise SettingsError("nothing to compare: name at least one tuned checkpoint")
    for option, value in (("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens), ("--max-rows", max_rows)):
        if value is not None and value < 1:
            raise SettingsError(f"{option} {value}: expected at least 1")
    thresholds = [parse_threshold(text) for text in fail_if]
    if strict and not thresholds:
        raise SettingsError("--strict without effect: there is no --fail-if")
    measures, left_out = read_measures(data, abilities, watch, columns, max_rows, notice)
    archive = None if subspaces is None else Archive(subspaces, rules=rules)
    others = [*HARMS, *(() if archive is None else (LEAK, UNVERIFIED, *_names(archive, measures)))]
    every: tuple[str, ...] = get_args(Figure)
    check_known(thresholds, {measure.name: every for measure in measures}, others)
    proofs = [_leak(base, each, subspaces, device, rules, progress) for each in tuned]

    def measure(model: str | Path, samples: Sequence[Sample] | None) -> _Found:
        loaded = _open(model, max_length, batch_size, device, offload, progress)
        with closing(loaded):
            use_template(loaded.tokenizer, chat_template)
            length = resolve_max_length(max_length, loaded.architecture.max_positions)
            reading = Reading(length, batch_size or rows_at_once(loaded, length), max_new_tokens, exact_match)
            if samples is None:
                samples = _samples(archive, loaded, length, left_out, progress)
            harm = measure_harm(loaded.model, samples, loaded.device, pad_id=loaded.pad_id) if samples else None
            kept = () if archive is None else read_protected(archive, loaded.architecture.vocab_size)
            named = [measure_protected(loaded.model, each, loaded.device, pad_id=loaded.pad_id) for each in kept]
            series = {each.name: each.of(loaded, reading, progress) for each in measures}
            figures = [("samples", harm.nats), *((each.name, each.harm.nats) for each in named)] if harm else []
            figures += [(name, each.mean.mean) for name, found in series.items() for each in found]
            for name, figure in figures:
                check_finite(loaded.checkpoint.path, name, figure)
            return _Found(series, harm, samples, tuple(named))

    before = measure(base, None)
    figures = {name: [series.figure for series in found] for name, found in before.series.items()}
    check_known(thresholds, figures, others if before.samples else others[len(HARMS) :])
    cards = []
    for model, leak in zip(tuned, proofs, strict=True):
        after = measure(model, before.samples)
        lines = _lines(measures, before, after)
        low, high = (None, None) if after.harm is None else interval(after.harm)
        failed = failures(thresholds, lines, after.harm, leak, after.named, strict=strict)
        cards.append(TunedCard(_name(model), lines, after.harm, low, high, leak, failed, after.named))
    return CardReport(
        base=_name(base),
        tuned=tuple(cards),
        thresholds=tuple(threshold.text for threshold in thresholds),
        strict=strict,
        passed=not any(each.failed for each in cards),
        harm_of=_drawn_from(archive) if before.samples else None,
        phrases=PHRASES if any(each.counts_refusals for each in measures) else (),
        left_out=tuple(left_out),
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Found:
    """What one model gave; the samples that harm is measured on go from the base to the others."""

    series: Mapping[str, Sequence[Series]]
    harm: Harm | None
    samples: Sequence[Sample]
    named: tuple[NamedHarm, ...]


def _names(archive: Archive, measures: Sequence[Measure]) -> list[str]:
    """What the archive protects by name, and reports on; thresholds have to tell it from everything else."""
    names = [each.name for each in read_protected(archive)]
    twice = sorted({*names} & ({measure.name for measure in measures} | {*RESERVED}))
    if twice:
        raise SettingsError(
            f"{twice[0]}: a file and a name that the archive protects are called the same; rename the file"
        )
    return names


def _name(model: str | Path) -> str:
    return published_name(Path(model)) if Path(model).exists() else str(model)


def _open(
    model: str | Path,
    max_length: int | None,
    batch_size: int | None,
    device: str,
    offload: ReadOffload,
    progress: Progress,
) -> LoadedModel:
    checkpoint = open_checkpoint(model)
    check_attention(checkpoint)
    architecture = inspect_architecture(checkpoint)
    if architecture.kind != "causal":
        raise CheckpointError(f"{checkpoint.path}: only causal models have a card; use `sculptor evaluate`")
    check_head(checkpoint, architecture)
    tokens = (batch_size or PLANNED_ROWS) * resolve_max_length(max_length, architecture.max_positions)
    return open_model(checkpoint, resolve_device(device), architecture, offload, tokens=tokens, progress=progress)


def _leak(
    base: str | Path,
    tuned: str | Path,
    subspaces: str | Path | None,
    device: str,
    rules: Kinds | None,
    progress: Progress,
) -> Leak | None:
    if subspaces is None:
        return None
    found = verify(base, tuned, subspaces, device=device, progress=progress, rules=rules)
    return Leak(found.passed, found.leak, found.rounding, found.max_leak)


def _drawn_from(archive: Archive | None) -> Literal["archive", "base"]:
    """Whose samples harm is measured on: an archive may keep none."""
    return "archive" if archive is not None and SECTION in archive.manifest.sections else "base"


def _samples(
    archive: Archive | None, loaded: LoadedModel, length: int, left_out: list[str], progress: Progress
) -> Sequence[Sample]:
    """What harm is measured on: the half of an archive's samples that reports, or, without any, samples drawn from the base."""
    if archive is not None and _drawn_from(archive) == "archive":
        return need_samples(archive, loaded.architecture.vocab_size).reporting
    try:
        return draw_samples(loaded, length, _SEED, progress, kept=_KEPT).all
    except (CheckpointError, DataError) as cause:
        left_out.append(f"harm is left out: {cause}")
        return ()


def _lines(measures: Sequence[Measure], before: _Found, after: _Found) -> tuple[Line, ...]:
    return tuple(
        _line(measure, old, new)
        for measure in measures
        for old, new in zip(before.series[measure.name], after.series[measure.name], strict=True)
    )


def _line(measure: Measure, old: Series, new: Series) -> Line:
    moved = change(old, new)
    return Line(
        name=measure.name,
        role=measure.role,
        figure=old.figure,
        num_rows=len(old.sums),
        base=old.mean.mean,
        base_error=old.mean.error,
        tuned=new.mean.mean,
        tuned_error=new.mean.error,
        change=moved.mean,
        change_error=moved.error,
        low=moved.low,
        high=moved.high,
    )
