"""`sculptor.analyze`: a checkpoint in, a subspace archive out; one matrix at a time, or the moments of a few blocks."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sculptor import __version__
from sculptor.analysis.cosines import measure_importance
from sculptor.analysis.derive import Measurement, decide, write_measured, write_rules
from sculptor.analysis.evidence import Source, weigh
from sculptor.analysis.sources import facts_of, sample_sources
from sculptor.analysis.streams import in_streams, num_streams, working_bytes
from sculptor.archive.manifest import FrozenMatrices, Manifest, MatrixRecord, TaskRecord
from sculptor.archive.store import Archive
from sculptor.archive.writer import ArchiveWriter, forget_progress, has_progress
from sculptor.checkpoint.ahead import ReadAhead
from sculptor.checkpoint.architecture import NO_ROW, Architecture, NotTargeted, Target
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.staging import commit
from sculptor.data.examples import resolve_max_length
from sculptor.data.rows import Data, Item, as_items, given_twice, local_files, names_of
from sculptor.errors import CheckpointError, DataError, OutputError, SettingsError
from sculptor.jobs.analyze_job import AnalyzeJob, files_key, new_records, open_analysis, run_key
from sculptor.jobs.analyze_report import AnalyzeReport, report_of
from sculptor.jobs.defaults import tell_choice
from sculptor.jobs.job import open_model
from sculptor.jobs.processes import Place, check_alike, join
from sculptor.jobs.protected import keep_protected
from sculptor.methods.kinds import Kinds, known_kinds, make_method
from sculptor.methods.method import Derived, Evidence
from sculptor.methods.settings import RULES, AnalyzeSettings
from sculptor.model.load import LoadedModel, resolve_device
from sculptor.model.samples import SECTION, SUFFIX, kept_samples
from sculptor.progress import Progress, silent
from sculptor.training.settings import ReadOffload
from sculptor.world import World


def analyze(
    model: str | Path,
    output: str | Path,
    settings: AnalyzeSettings | None = None,
    *,
    data: Data | None = None,
    offload: ReadOffload = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
    rules: Kinds | None = None,
) -> AnalyzeReport:
    """Saves the protected subspaces of a checkpoint as an archive.

    Args:
        model: a checkpoint directory or hub name.
        output: the archive's directory.
        settings: what to protect; the default is what the model says by itself uses (curvature).
        data: in the place of the settings' data, also a `Dataset` or any iterable of dicts; see `train`.
        offload: with calibration, where the model's blocks wait that are not being computed: none, cpu, disk, or auto.
        overwrite: replace an existing archive, at success.
        resume: take up what a killed run left.
        progress: makes progress bars.
        notice: told, in a line, what was chosen, what it takes, and what form of data was recognised.
        rules: kinds of rules beside sculptor's own.

    Returns:
        A table per role.

    Raises:
        SculptorError: if the checkpoint, the data or the output cannot be used.
    """
    settings = settings or AnalyzeSettings()
    if data is not None and settings.data:
        raise SettingsError("data twice: as an argument and in the settings; give one of the two")
    items, kinds = as_items(settings.data if data is None else data), known_kinds(rules)
    twice = given_twice(items)
    if twice is not None:
        raise SettingsError(f"--data {twice!r} is given twice")
    given = replace(settings, data=tuple(map(_named, items)))
    make_method(given, kinds)  # refuses before any work
    output, world = Path(output).resolve(), join(given.device)
    device = resolve_device(given.device)
    place = Place(world, output, "analyze", overwrite, resume)
    read = [*filter(None, [given.chat_template]), *local_files([*items, *given.protected.values()])]
    place.check([model, *read])
    with world.together():
        job = open_analysis(model, given, items, kinds, device, notice)
    with place.staged([job.checkpoint.path, *read, *local_files(job.items)], has_progress) as partial:
        tell_choice(given, job.settings, job.checkpoint, job.targets, device, notice)
        check_alike(world, files_key(job))
        records = new_records(job.checkpoint, job.targets, progress, world)
        key = run_key(job, records, progress)
        check_alike(world, key)
        dtype = getattr(torch, job.settings.dtype)
        with _of_these_inputs(partial, world), closing(ArchiveWriter(partial, dtype, key, kinds)) as writer:
            done = world.once(lambda: _taken_up(writer))
            run = _Run(job, records, writer, done, device, offload, world, progress, notice)
            found = _measure(run) if job.calibrated else _decompose(run)
            world.once(lambda: _finish(run, found, Path(model).name))
        world.once(lambda: _place(partial, output, overwrite))
    return report_of(Archive(output, rules=rules), job.checkpoint)


@dataclass(frozen=True, eq=False, slots=True)
class _Run:
    """An analysis under way: its inputs, the archive that grows, and what was `done` before it was stopped."""

    job: AnalyzeJob
    records: Mapping[str, MatrixRecord]
    writer: ArchiveWriter
    done: Set[str]
    device: torch.device
    offload: ReadOffload
    world: World
    progress: Progress
    notice: Callable[[str], object]

    def open_model(self) -> AbstractContextManager[LoadedModel]:
        """The model, to run it."""
        job = self.job
        return closing(open_model(job.checkpoint, self.device, job.architecture, self.offload, progress=self.progress))


@dataclass(frozen=True, slots=True)
class _Found:
    """What was measured on: sources of rows, and the matrices that none of these reached."""

    sources: Sequence[Source] = ()
    unreached: Sequence[str] = ()


@contextmanager
def _of_these_inputs(partial: Path, world: World) -> Iterator[None]:
    """Forgets what was made of an input that has to be another one."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        if world.first and not isinstance(error.__cause__, OSError):  # which may go well the next time
            forget_progress(partial)
        raise


def _measure(run: _Run) -> _Found:
    """Evidence of rows that the model reads, and rules that follow from it."""
    job, world = run.job, run.world
    with run.open_model() as loaded:
        sampled = world.once(lambda: sample_sources(loaded, job.settings, job.items, run.progress))
        sources = [*job.sources, *sampled]
        asked = Measurement(
            records=dict(run.records),
            targets=job.targets,
            sources=sources,
            measures=job.measures,
            settings=job.settings,
            make=job.method.derive,
            leaves_out=True,
        )
        unreached = write_measured(loaded, asked, run.writer, run.progress, world)
        _keep_samples(run, loaded)
        keep_protected(run.writer, loaded, job.settings, job.named, world, run.notice)
    return _Found(sources, unreached)


def _decompose(run: _Run) -> _Found:
    """Rules that follow from one matrix after another."""
    job = run.job
    _check_finite(job.checkpoint, job.targets, run.progress)
    cosines = measure_importance(
        job.checkpoint, job.architecture, job.targets, job.examples, job.settings.seed, run.device, run.progress
    )
    blocks: dict[str, list[Target]] = defaultdict(list)
    for target in job.targets:
        if target.name not in run.done:
            blocks[target.block].append(target)
    with closing(run.progress(total=len(job.targets), desc="analyze", unit="matrix", initial=len(run.done))) as bar:
        groups = list(blocks.values())
        mine = {target.name: target for group in run.world.share(groups) for target in group}
        sizes = {name: job.checkpoint.info_of(target).num_bytes for name, target in mine.items()}
        ahead = ReadAhead(lambda name: job.checkpoint.matrix(mine[name]), ([name] for name in mine), sizes)

        def evidence() -> Iterator[Evidence]:
            for target in mine.values():
                weight = weigh(job.checkpoint, target, run.device, ahead.take(target.name))
                yield Evidence(target.name, target.shape, weight, cosines.get(target.name))

        needed = max((working_bytes(target, moments=False) for target in mine.values()), default=0)
        made = in_streams(job.method.derive, evidence(), run.device, num_streams(run.device, needed))

        def derive(block: Sequence[Target]) -> Iterator[tuple[str, Derived]]:
            for target, derived in zip(block, made):  # noqa: B905 - which goes on with the next block
                yield target.name, derived

        with closing(ahead), closing(made):
            for _ in write_rules(run.writer, groups, derive, run.records, run.world):
                bar.update(1)
    if job.settings.samples:
        with run.open_model() as loaded:
            _keep_samples(run, loaded)
    return _Found()


def _finish(run: _Run, found: _Found, model: str) -> None:
    """Decides all rules, and writes what the archive says of itself."""
    job, writer = run.job, run.writer
    weights = tuple(source.weight for source in found.sources)
    task = TaskRecord("analysis", "analysis", weights, tuple(map(facts_of, found.sources)), {"model": model})
    decide(writer, job.method, weights)
    reached = [target for target in job.targets if target.name not in found.unreached]
    writer.finish(
        Manifest(
            created_by=f"sculptor {__version__}",
            model_class=job.architecture.model_class,
            base_identity="",
            settings=_published(job.settings),
            tasks=(task,),
            matrices={target.name: writer.record(target.name) for target in reached},
            tensors={},
            files={},
            not_targeted=_frozen(job.architecture, job.targets, found.unreached),
        ),
        keep_progress=True,
    )


def _keep_samples(run: _Run, loaded: LoadedModel) -> None:
    """Adds the section of samples, unless it is not wanted, or nobody asked and the model has none to give."""
    settings = run.job.settings
    if settings.samples is False or (loaded.kind != "causal" and not settings.samples):
        return
    max_length = resolve_max_length(settings.max_length, loaded.architecture.max_positions)
    content, reason = run.world.once(lambda: kept_samples(loaded, max_length, settings.seed + 1, run.progress))
    if content is None and settings.samples:
        raise DataError(f"--samples: {reason}")
    if content is None:
        run.notice(f"no samples kept, so harm cannot be measured: {reason}")
    elif run.world.first:
        run.writer.add_section(SECTION, content, SUFFIX)


def _check_finite(checkpoint: Checkpoint, targets: Sequence[Target], progress: Progress) -> None:
    """Tensors that are not decomposed have to be finite too: the model runs on all of them."""
    whole = {target.tensor for target in targets if target.part is None}
    rest = [name for name in checkpoint if name not in whole]
    with closing(progress(total=len(rest), desc="check", unit="tensor")) as bar:
        for name in rest:
            checkpoint.read_finite(name)
            bar.update(1)


def _taken_up(writer: ArchiveWriter) -> set[str]:
    """Names of the matrices that a run before has made."""
    writer.resume()
    return set(writer.records)


def _place(partial: Path, output: Path, overwrite: bool) -> None:
    commit(partial, output, overwrite=overwrite)
    with suppress(OutputError):  # the archive is complete all the same
        forget_progress(output)


def _frozen(
    architecture: Architecture, targets: Sequence[Target], unreached: Sequence[str]
) -> tuple[FrozenMatrices, ...]:
    """What no rule is for: by the architecture, and what no row reached."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for target in targets:
        if target.name in unreached:
            sizes[target.role].append(target.shape[0] * target.shape[1])
    rows = (NotTargeted(role, len(counts), sum(counts), NO_ROW) for role, counts in sizes.items())
    return tuple(FrozenMatrices(**asdict(item)) for item in (*architecture.not_targeted, *rows))


def _published(settings: AnalyzeSettings) -> AnalyzeSettings:
    """Settings as an archive keeps them: names of files, no folders."""
    template = settings.chat_template and Path(settings.chat_template).name
    basis = settings.resolved_basis if settings.rule in RULES else settings.basis
    protect = [f"{name}={names_of([item])[0]}" for name, item in settings.protected.items()]
    return replace(settings, basis=basis, data=names_of(settings.data), protect=tuple(protect), chat_template=template)


def _named(item: Item) -> str:
    """How settings call data."""
    return str(item) if isinstance(item, str | Path) else names_of([item])[0]
