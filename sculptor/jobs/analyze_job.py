"""The opened and checked inputs of an analysis, and what is known of its matrices before it begins."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sculptor.analysis.cosines import read_examples
from sculptor.analysis.evidence import Source
from sculptor.analysis.sources import calibration_sources
from sculptor.archive.manifest import MatrixRecord
from sculptor.checkpoint.architecture import Architecture, Target, inspect_architecture
from sculptor.checkpoint.configuration import check_attention
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.selection import select_targets
from sculptor.checkpoint.tensors import digest, dtype_name, in_threads
from sculptor.checkpoint.written import fingerprint
from sculptor.data.examples import Example, digest_examples
from sculptor.data.rows import Item
from sculptor.errors import SettingsError
from sculptor.jobs.defaults import fill_in
from sculptor.jobs.protected import Named, named_sources
from sculptor.methods.kinds import Kinds, make_method
from sculptor.methods.method import Measures, Method, measures_of
from sculptor.methods.settings import AnalyzeSettings
from sculptor.methods.staircase import StaircaseRule
from sculptor.model.load import check_trainable
from sculptor.numerics.rounding import rms
from sculptor.numerics.staircase import Staircase
from sculptor.progress import Progress
from sculptor.world import ALONE, World


@dataclass(frozen=True, eq=False, slots=True)
class AnalyzeJob:
    """Opened and checked inputs of an analysis.

    Attributes:
        settings: resolved.
        items: data that are read.
        targets: the matrices that are analyzed.
        method: derives their rules.
        measures: what it has to see.
        sources: rows that the model reads to measure it; `examples` are those of the paper's importance.
        named: what of these stands for a protected name.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    settings: AnalyzeSettings
    items: Sequence[Item]
    targets: Sequence[Target]
    method: Method
    measures: Measures
    sources: Sequence[Source]
    examples: Sequence[Example]
    named: Sequence[Named] = ()

    @property
    def calibrated(self) -> bool:
        """Whether the model is run for it, a few blocks at a time."""
        return self.measures in ("inputs", "gradients")


def open_analysis(
    model: str | Path,
    settings: AnalyzeSettings,
    items: Sequence[Item],
    kinds: Kinds,
    device: torch.device,
    notice: Callable[[str], object],
) -> AnalyzeJob:
    """Opens and checks everything that an analysis reads, before any work.

    Raises:
        SculptorError: if an input cannot be used, or a setting does not go with it.
    """
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
    if settings.protect and not calibrated:
        raise SettingsError(
            "--protect without effect: what rows need is measured with --basis curvature or inputs only"
        )
    if calibrated:
        settings = fill_in(settings, checkpoint, architecture, device)
        items = items or list(settings.data)
    sources = calibration_sources(checkpoint, architecture, settings, items, notice) if calibrated else []
    named = named_sources(checkpoint, architecture, settings, notice) if calibrated else []
    sources += [each.source for each in named]
    examples = read_examples(checkpoint, architecture, settings, items, notice) if measures == "cosines" else ()
    return AnalyzeJob(checkpoint, architecture, settings, items, targets, method, measures, sources, examples, named)


def _check_samples(settings: AnalyzeSettings, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuses to keep samples of what says nothing."""
    if settings.samples and architecture.kind != "causal":
        raise SettingsError(
            f"--samples: {checkpoint.path} is no causal model, and only those can sample text; leave it out"
        )


def run_key(job: AnalyzeJob, records: Mapping[str, MatrixRecord], progress: Progress) -> dict[str, Any]:
    """What has to be the same for a run that was stopped to be taken up."""
    key: dict[str, Any] = {
        "settings": asdict(job.settings),
        "data": [digest_examples(part) for part in (job.examples, *(source.examples for source in job.sources))],
        "base": identity({name: record.base_digest for name, record in records.items()}),
    }
    if job.measures != "nothing":  # the rest of the model decides what is measured, too
        whole = {target.tensor for target in job.targets if target.part is None}
        key["model"] = job.checkpoint.digests_beside(whole, progress)
    return key


def files_key(job: AnalyzeJob) -> dict[str, Any]:
    """Sizes and samples of the checkpoint's files, which every process has to see."""
    return {file: fingerprint((job.checkpoint.path / file).resolve()) for file in job.checkpoint.files}


def new_records(
    checkpoint: Checkpoint, targets: Sequence[Target], progress: Progress, world: World = ALONE
) -> dict[str, MatrixRecord]:
    """What is known of every matrix before it is analyzed; each process reads some of them."""
    share, found = world.share(targets), dict[str, MatrixRecord]()
    with closing(progress(total=len(share), desc="digest", unit="matrix")) as bar, world.together():
        for record in in_threads(functools.partial(_new_record, checkpoint), share):
            found[record.name] = record
            bar.update(1)
    together = {name: record for part in world.gather(found) for name, record in part.items()}
    return {target.name: together[target.name] for target in targets}


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
