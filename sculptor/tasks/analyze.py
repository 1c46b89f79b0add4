"""`sculptor.analyze`: a checkpoint in, a subspace archive out; one matrix at a time, or the moments of a few blocks."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sculptor import __version__
from sculptor.analysis.cosines import measure_importance, read_examples
from sculptor.analysis.derive import Packing, decide, write_measured
from sculptor.analysis.evidence import weigh
from sculptor.analysis.sources import calibration_sources, facts_of, sample_sources
from sculptor.archive.manifest import FrozenMatrices, Manifest, MatrixRecord, TaskRecord
from sculptor.archive.store import Archive
from sculptor.archive.writer import ArchiveWriter, forget_progress, has_progress
from sculptor.checkpoint.architecture import (
    NO_ROW,
    Architecture,
    NotTargeted,
    Target,
    inspect_architecture,
)
from sculptor.checkpoint.configuration import check_attention
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.selection import select_targets
from sculptor.checkpoint.staging import commit
from sculptor.checkpoint.tensors import digest, dtype_name, in_threads
from sculptor.data.examples import digest_examples, resolve_max_length
from sculptor.data.rows import Data, Item, as_items, local_files, names_of
from sculptor.errors import CheckpointError, DataError, OutputError, SettingsError
from sculptor.methods.kinds import Kinds, known_kinds, make_method
from sculptor.methods.method import Derived, Evidence, measures_of
from sculptor.methods.settings import RULES, AnalyzeSettings
from sculptor.methods.staircase import StaircaseRule
from sculptor.model.load import LoadedModel, check_trainable, resolve_device
from sculptor.model.samples import SECTION, SUFFIX, kept_samples
from sculptor.numerics.rounding import rms
from sculptor.numerics.staircase import Staircase
from sculptor.progress import Progress, silent
from sculptor.tasks.analyze_report import AnalyzeReport, report_of
from sculptor.tasks.defaults import fill_in, tell_choice
from sculptor.tasks.job import open_model
from sculptor.tasks.processes import check_alike, join, staged_together
from sculptor.training.settings import Offload
from sculptor.world import World


def analyze(
    model: str | Path,
    output: str | Path,
    settings: AnalyzeSettings | None = None,
    *,
    data: Data | None = None,
    offload: Offload = "auto",
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
    items = as_items(settings.data if data is None else data)
    settings = given = replace(settings, data=tuple(map(_named, items)))
    kinds = known_kinds(rules)
    make_method(settings, kinds)  # refuses before any work
    world = join(settings.device)
    device = resolve_device(settings.device)
    with world.together():
        checkpoint = open_checkpoint(model, settings.attn_implementation)
        check_attention(checkpoint)
        architecture = inspect_architecture(checkpoint)
        check_trainable(checkpoint, architecture)
        _check_samples(settings, checkpoint, architecture)
        targets = select_targets(architecture.targets, settings.targets, settings.exclude)
        method = make_method(settings, kinds, [target.shape for target in targets])
        measures = measures_of(method, "derive")
        if measures == "nothing" and settings.attn_implementation is not None:
            raise SettingsError("--attn-implementation without effect: the model is not run, only its weights are read")
        calibrated = measures in ("inputs", "gradients")
        if calibrated:
            settings = fill_in(settings, checkpoint, architecture, device)
            items = items or list(settings.data)
        sources = calibration_sources(checkpoint, architecture, settings, items, notice) if calibrated else []
        examples = read_examples(checkpoint, architecture, settings, items, notice) if measures == "cosines" else ()
    output = Path(output).resolve()
    with staged_together(
        world,
        output,
        command="analyze",
        inputs=[checkpoint.path, *local_files(items), *filter(None, [settings.chat_template])],
        overwrite=overwrite,
        resume=resume,
        worth_keeping=has_progress,
    ) as partial:
        tell_choice(given, settings, checkpoint, targets, notice)
        records = _new_records(checkpoint, targets, progress)
        key = {
            "settings": asdict(settings),
            "data": [digest_examples(part) for part in (examples, *(source.examples for source in sources))],
            "base": identity({name: record.base_digest for name, record in records.items()}),
        }
        if measures != "nothing":  # the rest of the model decides what is measured, too
            key["model"] = checkpoint.digests_beside(
                {target.tensor for target in targets if target.part is None}, progress
            )
        check_alike(world, key)
        unreached: list[str] = []
        try:
            with closing(ArchiveWriter(partial, getattr(torch, settings.dtype), key, kinds)) as writer:
                done = world.once(lambda: _taken_up(writer))
                if calibrated:
                    loaded = open_model(checkpoint, device, architecture, offload, progress=progress)
                    with closing(loaded):
                        sources += world.once(lambda: sample_sources(loaded, settings, items, progress))
                        write_measured(
                            loaded,
                            records,
                            targets,
                            sources,
                            measures,
                            settings,
                            method.derive,
                            writer if world.first else None,
                            progress,
                            unreached=unreached,
                            world=world,
                        )
                        _keep_samples(writer, loaded, settings, world, progress, notice)
                else:
                    _check_finite(checkpoint, targets, progress)
                    cosines = measure_importance(
                        checkpoint, architecture, targets, examples, settings.seed, device, progress
                    )
                    todo = [target for target in targets if target.name not in done]
                    bar = progress(total=len(targets), desc="analyze", unit="matrix", initial=len(done))
                    ends = {target.block: target.name for target in targets}.values()

                    def derive(target: Target) -> Iterator[tuple[str, Derived]]:
                        weight, cosine = weigh(checkpoint, target, device), cosines.get(target.name)
                        derived = method.derive(Evidence(target.name, target.shape, weight, cosine))
                        yield target.name, derived if world.size == 1 else packing.pack(records[target.name], derived)

                    packing = Packing()
                    for name, derived in world.in_order(todo, derive):
                        writer.add(records[name], derived)
                        bar.update(1)
                        if name in ends:
                            writer.flush()
                    bar.close()
                    if settings.samples:
                        loaded = open_model(checkpoint, device, architecture, offload, progress=progress)
                        with closing(loaded):
                            _keep_samples(writer, loaded, settings, world, progress, notice)
                weights = tuple(source.weight for source in sources)
                task = TaskRecord(
                    "analysis", "analysis", weights, tuple(map(facts_of, sources)), {"model": Path(model).name}
                )

                def finish() -> None:
                    decide(writer, method, weights)
                    writer.finish(
                        Manifest(
                            created_by=f"sculptor {__version__}",
                            model_class=architecture.model_class,
                            base_identity="",
                            settings=_published(settings),
                            tasks=(task,),
                            matrices={
                                target.name: writer.record(target.name)
                                for target in targets
                                if target.name not in unreached
                            },
                            tensors={},
                            files={},
                            not_targeted=_frozen(architecture, targets, unreached),
                        ),
                        keep_progress=True,
                    )

                world.once(finish)
        except (CheckpointError, DataError) as error:
            if world.first and not isinstance(error.__cause__, OSError):  # which may go well the next time
                forget_progress(partial)  # of an input that has to be another one
            raise
        world.once(lambda: _place(partial, output, overwrite))
    return report_of(Archive(output, rules=rules), checkpoint)


def _check_samples(settings: AnalyzeSettings, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuses to keep samples of what says nothing."""
    if settings.samples and architecture.kind != "causal":
        raise SettingsError(
            f"--samples: {checkpoint.path} is no causal model, and only those can sample text; leave it out"
        )


def _keep_samples(
    writer: ArchiveWriter,
    loaded: LoadedModel,
    settings: AnalyzeSettings,
    world: World,
    progress: Progress,
    notice: Callable[[str], object],
) -> None:
    """Adds the section of samples, unless it is not wanted, or nobody asked and the model has none to give."""
    if settings.samples is False or (loaded.kind != "causal" and not settings.samples):
        return
    max_length = resolve_max_length(settings.max_length, loaded.architecture.max_positions)
    content, reason = world.once(lambda: kept_samples(loaded, max_length, settings.seed + 1, progress))
    if content is None and settings.samples:
        raise DataError(f"--samples: {reason}")
    if content is None:
        notice(f"no samples kept, so harm cannot be measured: {reason}")
    elif world.first:
        writer.add_section(SECTION, content, SUFFIX)


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
    return replace(settings, basis=basis, data=names_of(settings.data), chat_template=template)


def _named(item: Item) -> str:
    """How settings call data."""
    return str(item) if isinstance(item, str | Path) else names_of([item])[0]


def _check_finite(checkpoint: Checkpoint, targets: Sequence[Target], progress: Progress) -> None:
    """Tensors that are not decomposed have to be finite too: the model runs on all of them."""
    whole = {target.tensor for target in targets if target.part is None}
    rest = [name for name in checkpoint if name not in whole]
    bar = progress(total=len(rest), desc="check", unit="tensor")
    for name in rest:
        checkpoint.read_finite(name)
        bar.update(1)
    bar.close()


def _new_records(checkpoint: Checkpoint, targets: Sequence[Target], progress: Progress) -> dict[str, MatrixRecord]:
    bar = progress(total=len(targets), desc="digest", unit="matrix")
    found = {}
    for record in in_threads(functools.partial(_new_record, checkpoint), targets):
        found[record.name] = record
        bar.update(1)
    bar.close()
    return found


def _new_record(checkpoint: Checkpoint, target: Target) -> MatrixRecord:
    """What is known of a matrix before it is analyzed: closed, until there is a rule."""
    weight = checkpoint.matrix(target)
    return MatrixRecord(
        tensor=target.tensor,
        part=target.part,
        parameter=target.parameter,
        block=target.block,
        index=target.index,
        role=target.role,
        transposed=target.transposed,
        input_group=target.input_group,
        base_dtype=dtype_name(weight.dtype),
        base_digest=digest(weight),
        base_rms=rms(weight),
        rule=StaircaseRule(target.shape, Staircase.closed(*target.shape).steps),
        window=target.window,
    )
