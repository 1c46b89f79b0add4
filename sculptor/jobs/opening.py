"""Rules that follow a task's rows: an archive for one training, made before its first step (`methods.method.Opens`)."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sculptor.analysis.derive import Measurement, decide, write_measured
from sculptor.analysis.evidence import Source
from sculptor.archive.places import OPENED
from sculptor.archive.store import MANIFEST_NAME, Archive
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.staging import move_back, writing
from sculptor.data.examples import Example, digest_examples
from sculptor.jobs.job import TrainJob, open_model, read_offload
from sculptor.jobs.made_of import check_made_of
from sculptor.jobs.memory import memory_of
from sculptor.methods.method import Evidence, Opens, measures_of
from sculptor.progress import Progress
from sculptor.world import ALONE, World


def _finish(writer: ArchiveWriter, archive: Archive) -> None:
    writer.keep_sections(archive)
    writer.finish(archive.manifest)


def _made_of(job: TrainJob, rows: Sequence[Example], progress: Progress) -> dict[str, Any]:
    """What has to be the same for rules that were opened, or begun, to be of use; the first process reads it."""
    archive = job.archive
    return {
        "subspaces": archive.identity,
        "base": archive.manifest.base_identity,
        "model": job.checkpoint.digests_beside({record.tensor for record in archive.values()}, progress),
        "rows": digest_examples(rows),
        "settings": asdict(archive.manifest.settings),
    }


def reached(evidence: Evidence) -> Evidence:
    """Refuses to open a rule by rows that do not reach its matrix.

    Raises:
        ValueError: naming it.
    """
    if evidence.inputs is None:
        raise ValueError(f"no row reaches {evidence.name}; leave it out with --exclude")
    return evidence


def open_rules(
    job: TrainJob, device: torch.device, partial: Path, progress: Progress, world: World = ALONE
) -> TrainJob:
    """The job with the archive that it is trained with: its own, unless the rules follow the task's rows.

    What was made before a run was stopped is taken up again, and stays beside the output: it says what was protected.

    Args:
        job: opened inputs.
        device: where to measure.
        partial: staging directory of the output.
        progress: makes progress bars.
        world: the processes that share the work.
    """
    archive, method = job.archive, job.archive.method
    measures = measures_of(method, "open")
    if not isinstance(method, Opens) or measures == "nothing":
        return job
    path, rows = partial / OPENED, memory_of(job)
    world.once(lambda: move_back(partial, OPENED))
    key = world.once(lambda: _made_of(job, rows, progress))
    world.once(lambda: check_made_of(partial, OPENED, key, "left by a run with other inputs or settings"))
    if not world.from_first((path / MANIFEST_NAME).is_file()):
        with writing(path):
            path.mkdir(exist_ok=True)
        source = Source(job.name, rows)
        targets = [target for target in job.architecture.targets if target.name in archive]
        settings = archive.manifest.settings
        asked = Measurement(
            records=dict(archive),
            targets=targets,
            sources=[source],
            measures=measures,
            settings=settings,
            make=lambda evidence: method.open(archive.read(evidence.name), reached(evidence)),
            task=len(archive.manifest.tasks),
        )
        with closing(ArchiveWriter(path, getattr(torch, settings.dtype), key, archive.kinds)) as writer:
            world.once(writer.resume)
            # Every process reads all of it: what is to be divided is in nobody's memory as a whole.
            offload = "disk" if job.settings.parallel == "shard" else read_offload(job.settings.offload)
            with closing(open_model(job.checkpoint, device, job.architecture, offload, progress=progress)) as loaded:
                write_measured(loaded, asked, writer, progress, world)
            world.once(lambda: decide(writer, method, [*archive.manifest.source_weights, source.weight]))
            world.once(lambda: _finish(writer, archive))
    return replace(job, archive=Archive(path, rules=archive.own_kinds), unopened=archive)
