"""`sculptor edit lines|interpolate|project|threshold`: a checkpoint from a base and what tuning made of it.

One pass over the checkpoint that is copied, one tensor in memory. That is TUNED, with its configuration and tokenizer; for
`project`, which gives what training inside the archive could have given, and for an adapter it is BASE.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sculptor.archive.store import Archive
from sculptor.checkpoint.directory import check_modules, tell_left_behind
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.records import RECORD_NAME, read_record
from sculptor.checkpoint.sameness import differences, tokenizer_differences
from sculptor.checkpoint.staging import check_apart, one_pass, write_json
from sculptor.checkpoint.writer import write_checkpoint
from sculptor.edits.difference import Edit
from sculptor.edits.interpolate import Even
from sculptor.edits.lines import Layered
from sculptor.edits.pairs import Pairs, open_pairs
from sculptor.edits.passes import EditPass
from sculptor.edits.project import Projection
from sculptor.edits.settings import Choose, EditSettings, Interpolate, Lines, Project
from sculptor.edits.threshold import Denoised
from sculptor.errors import SettingsError
from sculptor.jobs.edit_choice import choose_best, open_trial
from sculptor.jobs.edit_record import Making, edit_readme, edit_record
from sculptor.jobs.edit_report import Choice, EditReport
from sculptor.jobs.readme import write_readme
from sculptor.methods.kinds import Kinds
from sculptor.model.load import resolve_device
from sculptor.progress import Progress, silent
from sculptor.training.settings import SaveDtype

# What is tried of --soft.
SOFTS = (0.0, 0.3, 1.0, 3.0)


def edit(
    base: str | Path,
    tuned: str | Path,
    output: str | Path | None,
    settings: EditSettings,
    *,
    subspaces: str | Path | None = None,
    choose: Choose | None = None,
    save_dtype: SaveDtype = "keep",
    device: str = "auto",
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
    rules: Kinds | None = None,
) -> EditReport:
    """Writes a checkpoint that keeps a part of what tuning changed.

    Args:
        base: checkpoint directory or hub name.
        tuned: what was made of it, or a LoRA adapter for it.
        output: directory to write; None with `dry_run`.
        settings: which edit, and its numbers.
        subspaces: archive of the base, for `Project`.
        choose: rows and texts by which free numbers are chosen, in the place of giving them.
        save_dtype: dtype of the output; keep: that of the checkpoint that is copied.
        device: where products and evaluations run.
        dry_run: measure what would stay, and write nothing.
        overwrite: replace an existing output.
        progress: makes progress bars.
        notice: told, in a line, what looks like weights and does not go along.
        rules: kinds of rules beside sculptor's own.

    Returns:
        How much of the difference stays, by role and in all, and what was tried to choose it.

    Raises:
        SculptorError: if an input cannot be used, settings contradict each other, or the output cannot be written.
    """
    if (output is None) != dry_run:
        raise SettingsError(
            "--output is needed" if output is None else "--output without effect: --dry-run writes nothing"
        )
    if isinstance(settings, Project) != (subspaces is not None):
        raise SettingsError(
            f"--subspaces {'is needed' if subspaces is None else 'without effect'} with {settings.command}"
        )
    chosen = choose if choose is not None and choose.choose else None
    _check_numbers(settings, chosen)
    pairs = open_pairs(base, tuned, copy_base=isinstance(settings, Project))
    read_record(pairs.source.path)  # refuses a damaged one now: its lineage goes on in the output's
    archive = None if subspaces is None else _open_archive(subspaces, pairs.base, settings, rules, progress)
    saved = None if save_dtype == "keep" else getattr(torch, save_dtype)
    job = _Job(pairs, archive, settings, chosen, resolve_device(device), saved, progress)
    if output is None:
        return job.measure()
    check_modules(pairs.source.path)
    tell_left_behind(pairs.source.path, pairs.source.files, notice)
    output = Path(output).resolve()
    check_apart(output, [pairs.base.path, pairs.tuned.path, *([] if archive is None else [archive.path]), *job.files])
    with one_pass(output, command=f"edit {settings.command}", overwrite=overwrite) as staged:
        return job.write(staged, output)


def _check_numbers(settings: EditSettings, choose: Choose | None) -> None:
    """Numbers are either given or chosen."""
    given = [settings.alpha] + ([settings.soft] if isinstance(settings, Project) else [])
    if choose is None and isinstance(settings, Lines | Interpolate) and settings.alpha is None:
        raise SettingsError("--alpha is needed, or --choose, which finds it")
    if choose is not None and None not in given:
        raise SettingsError("--choose without effect: all numbers are given")


def _open_archive(
    subspaces: str | Path, base: Checkpoint, settings: EditSettings, rules: Kinds | None, progress: Progress
) -> Archive:
    archive = Archive(subspaces, rules=rules)
    if isinstance(settings, Project) and settings.soft and not _knows_importance(archive):
        raise SettingsError(
            f"--soft without effect: {archive.path} has basis {archive.method.terms.basis}, which has no importance of pairs; "
            "analyze with --basis curvature"
        )
    archive.check_base(base, progress)
    return archive


def _knows_importance(archive: Archive) -> bool:
    return archive.method.defaults.soften is not None


@dataclass(eq=False)
class _Job:
    """The opened and checked inputs of an edit."""

    pairs: Pairs
    archive: Archive | None
    settings: EditSettings
    choose: Choose | None
    device: torch.device
    saved: torch.dtype | None
    progress: Progress
    choice: Choice | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """That are read beside checkpoints and archive."""
        return () if self.choose is None else (*self.choose.choose, *self.choose.watch)

    def measure(self) -> EditReport:
        """What would stay."""
        settings = self._decide()
        making = Making(self.pairs)
        made = self._pass(settings, making)
        with closing(self.progress(total=self.pairs.source.num_bytes, desc="measure", unit="B")) as bar:
            for name in self.pairs.by_name:
                made.tensor(name)
                bar.update(self.pairs.source.infos[name].num_bytes)
        return self._report(settings, making, None)

    def write(self, staged: Path, output: Path) -> EditReport:
        """Checkpoint and record, into a staged directory."""
        settings = self._decide()
        making = Making(self.pairs)
        source = self.pairs.source
        with closing(self.progress(total=source.num_bytes, desc="write", unit="B")) as bar:
            write_checkpoint(source, staged, self._pass(settings, making).changes(), dtype=self.saved, bar=bar)
        report = self._report(settings, making, output)
        write_json(staged / RECORD_NAME, edit_record(making, report, self.archive, self.saved, self.facts))
        write_readme(staged, edit_readme(making, report, self.archive, self.facts))
        return report

    def _pass(self, settings: EditSettings, making: Making) -> EditPass:
        return EditPass(self.pairs, self._edit(settings), self.device, self.saved, making.note)

    def _edit(self, settings: EditSettings) -> Edit:
        alpha = 1.0 if settings.alpha is None else settings.alpha
        if isinstance(settings, Project):
            assert self.archive is not None
            return Projection(self.archive, settings.soft or 0.0, alpha)
        if isinstance(settings, Lines):
            return Layered(alpha, settings.beta)
        return Even(alpha) if isinstance(settings, Interpolate) else Denoised(alpha)

    def _decide(self) -> EditSettings:
        """The settings with every number: given, chosen, or the default."""
        settings = self.settings
        if self.choose is not None:
            alphas = self.choose.alphas if settings.alpha is None else (settings.alpha,)
            trial, self.facts = open_trial(self.pairs, self.choose, self.device, self.saved)
            self.choice = choose_best(
                trial, lambda a, s: self._edit(_with(settings, a, s)), alphas, self._softs(), self.progress
            )
            best = self.choice.points[self.choice.best]
            settings = _with(settings, best.alpha, best.soft)
        alpha = 1.0 if settings.alpha is None else settings.alpha
        if isinstance(settings, Lines):
            return replace(settings, beta=1 - alpha if settings.beta is None else settings.beta)
        return _with(settings, alpha, settings.soft or 0.0 if isinstance(settings, Project) else None)

    def _softs(self) -> Sequence[float | None]:
        """What is tried of --soft."""
        if not isinstance(self.settings, Project):
            return (None,)
        if self.settings.soft is not None:
            return (self.settings.soft,)
        return SOFTS if self.archive is not None and _knows_importance(self.archive) else (0.0,)

    def _report(self, settings: EditSettings, making: Making, output: Path | None) -> EditReport:
        return EditReport(
            command=settings.command,
            output=output,
            numbers=asdict(settings),
            roles=making.tally.roles(),
            all=making.tally.total(),
            copied="base" if self.pairs.source is self.pairs.base else "tuned",
            not_taken=tuple(self._not_taken()),
            choice=self.choice,
        )

    def _not_taken(self) -> list[str]:
        base, tuned = self.pairs.base, self.pairs.tuned
        if self.pairs.source is not base:
            return []
        return (
            differences(base, tuned) if isinstance(tuned, Checkpoint) else tokenizer_differences(base.path, tuned.path)
        )


def _with(settings: EditSettings, alpha: float, soft: float | None) -> EditSettings:
    if isinstance(settings, Project):
        return replace(settings, alpha=alpha, soft=soft)
    return replace(settings, alpha=alpha)
