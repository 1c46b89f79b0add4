"""sculptor.json of a trained checkpoint: how it came about."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sculptor.archive.places import ANALYZED, OPENED
from sculptor.archive.store import Archive
from sculptor.checkpoint.directory import published_name
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.records import Merge
from sculptor.checkpoint.tensors import dtype_name
from sculptor.checkpoint.writer import output_dtype
from sculptor.data.examples import digest_examples
from sculptor.jobs.job import TrainJob
from sculptor.jobs.readme import Readme, code, listed
from sculptor.jobs.record import record_head
from sculptor.jobs.train_report import TrainReport
from sculptor.model.harm import Harm
from sculptor.training.settings import TrainSettings

# What an output depends on that another program's training ended with.
_OF_OUTPUT = ("carry", "memory_rows", "memory_weight", "soften", "save_dtype")
_HARM = "harm, KL(base || this) on samples of the first base that no step depended on"


def merge_of(checkpoint: Checkpoint, archive: Archive, saved: torch.dtype | None, opened: Sequence[str] = ()) -> Merge:
    """The rounding that writing a checkpoint's merged matrices is, and what was trained openly before."""
    dtypes: Any = {
        name: dtype_name(output_dtype(checkpoint.infos[record.tensor].dtype, saved)) for name, record in archive.items()
    }
    return Merge({name: record.base_digest for name, record in archive.items()}, dtypes, tuple(opened))


def published(settings: TrainSettings) -> dict[str, Any]:
    """Settings as records have them: names of files without their folders."""
    template = settings.chat_template
    return asdict(settings) | {"chat_template": None if template is None else Path(template).name}


def training_record(
    job: TrainJob, report: TrainReport, lineage: Sequence[Merge], saved: torch.dtype | None, *, analyzed: bool
) -> dict[str, Any]:
    """The record of a run, its lineage longer by one merge."""
    import accelerate

    mixture = job.encoded.mixture
    return {
        **record_head("train" if job.trainer is None else "trainer", accelerate=accelerate.__version__),
        "settings": published(job.settings)
        if job.trainer is None
        else {name: getattr(job.settings, name) for name in _OF_OUTPUT},
        **({} if job.trainer is None else {"trainer": dict(job.trainer)}),
        # Names and digests: a record is published, and somebody's folders are nobody's business.
        "data": {"files": list(job.data), "rows_sha256": job.rows_digest}
        | ({} if mixture is None else asdict(mixture))
        | ({"replay": [{"name": each.name, "share": each.share} for each in job.replays]} if job.replays else {}),
        **_chosen_by(job),
        "base": {"name": published_name(job.base.path), "identity": job.archive.manifest.base_identity},
        "lineage": [*map(asdict, lineage), asdict(merge_of(job.checkpoint, job.archive, saved, report.opened))],
        "analyzed": analyzed,  # whether the archive that protected it was made for it, and lies beside it
        **({"protect_data": list((job.unopened or job.archive).manifest.settings.data)} if analyzed else {}),
        "also_trained": list(report.also_trained),
        "not_targeted": [asdict(item) for item in report.not_targeted],
        "frozen": list(report.frozen),
        "examples": {"rows": report.num_examples, "dropped": report.num_dropped, "cut": report.num_cut},
        "num_trainable": report.num_trainable,
        "rose": report.rose,
        "result": {name: None if value != value else value for name, value in asdict(report.loop).items()},
        "matrices": {name: asdict(matrix) for name, matrix in report.matrices.items()},
    }


def _chosen_by(job: TrainJob) -> dict[str, Any]:
    """The rows that the best parameters were chosen by, if any."""
    if job.evaluation is None:
        return {}
    examples = job.evaluation.examples
    return {
        "eval_data": {"files": list(job.eval_data), "rows": len(examples), "tokens_sha256": digest_examples(examples)}
    }


def train_readme(job: TrainJob, report: TrainReport, *, analyzed: bool) -> Readme:
    """What the model card of a run tells."""
    return Readme(
        bases=(job.base.path,),
        done=f"taught {listed(job.data)}",
        summary=f"Fine-tuned on {listed(job.data)}, only within what a subspace archive of the base leaves free: what the archive "
        "protects of each matrix is as it was, up to rounding.",
        tags=("continual-learning",),
        figures=_figures(job, report),
        data=job.data,
        rows_digest=job.rows_digest,
        check=_check(job, analyzed),
    )


def harm_figures(harm: Harm) -> list[tuple[str, str]]:
    """Harm for a table of figures."""
    return [
        (_HARM, f"{harm.nats:.4f} ± {harm.error:.4f} nats per token"),
        (
            "of it at the first token of each, by which an answer begins",
            f"{harm.first:.4f} ± {harm.first_error:.4f} nats",
        ),
    ]


def _figures(job: TrainJob, report: TrainReport) -> list[tuple[str, str]]:
    loop = report.loop
    total = report.num_protected + job.archive.num_free
    unit = f" nats per {'row' if job.architecture.kind == 'classifier' else 'token'}"
    unit = unit if job.trainer is None else ""  # others have losses of their own
    best = (
        [] if loop.best_loss is None else [(f"evaluation loss, step {loop.best_step}, kept", f"{loop.best_loss:.4f}")]
    )
    losses = [
        ("training loss, first step and mean of the last tenth", f"{loop.first_loss:.4f}, {loop.last_loss:.4f}{unit}")
    ]
    losses = [] if math.isnan(loop.last_loss) else losses
    opened = [("trained without protection", listed(report.also_trained))] if report.also_trained else []
    return [
        ("rows", f"{report.num_examples:,}, {report.num_dropped:,} dropped, {report.num_cut:,} cut"),
        ("steps", f"{loop.steps:,}" + (f", {loop.tokens:,} tokens" if loop.tokens else "")),
        *losses,
        *best,
        *([("new tokens", listed([code(token) for token in report.new_tokens]))] if report.new_tokens else []),
        ("protected share of the matrices", f"{100 * report.num_protected / total:.1f} % of {total:,} parameters"),
        ("largest leak of a matrix into what is protected", f"{report.max_leak:.1e} of its update"),
        (
            "of it beyond what rounding explains",
            f"{report.unexplained_leak:.1e}" if report.unexplained_leak > 0 else "none",
        ),
        ("of the update, removed by rounding to the dtype of the file", f"{100 * report.rounding_loss:.1f} %"),
        *([] if loop.harm is None else harm_figures(loop.harm)),
        *opened,
    ]


def _check(job: TrainJob, analyzed: bool) -> str:
    base = code(published_name(job.base.path))
    if job.unopened is None and analyzed:
        place, archive = f"THIS/{ANALYZED}", "the archive that was made for it lies in this model"
    elif job.unopened is None:
        place, archive = "ARCHIVE", f"`ARCHIVE` the subspace archive {code(published_name(job.archive.path))} of it"
    else:
        place, archive = f"THIS/{OPENED}", "the archive that the run opened lies in this model"
    return (
        f"With `BASE` a copy of {base}, `THIS` this model, and {archive} (identity `{job.archive.identity}`):\n\n"
        f"```sh\nsculptor verify BASE THIS --subspaces {place}\n```\n\n"
        "It measures in the files that nothing protected has moved, and that nothing else has changed. `subspaces/` is the archive "
        "for the next task."
    )
