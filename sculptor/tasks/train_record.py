"""sculptor.json of a trained checkpoint: how it came about."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sculptor import __version__
from sculptor.archive.store import Archive
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.records import Merge
from sculptor.checkpoint.tensors import dtype_name
from sculptor.checkpoint.writer import output_dtype
from sculptor.tasks.job import TrainJob
from sculptor.tasks.train_report import TrainReport


def merge_of(checkpoint: Checkpoint, archive: Archive, saved: torch.dtype | None, opened: Sequence[str] = ()) -> Merge:
    """The rounding that writing a checkpoint's merged matrices is, and what was trained openly before."""
    dtypes: Any = {
        name: dtype_name(output_dtype(checkpoint.infos[record.tensor].dtype, saved)) for name, record in archive.items()
    }
    return Merge({name: record.base_digest for name, record in archive.items()}, dtypes, tuple(opened))


def training_record(
    job: TrainJob, report: TrainReport, lineage: Sequence[Merge], saved: torch.dtype | None, *, analyzed: bool
) -> dict[str, Any]:
    """The record of a run, its lineage longer by one merge."""
    import accelerate
    import safetensors
    import transformers

    settings = asdict(job.settings)
    mixture = job.encoded.mixture
    if job.settings.chat_template is not None:
        settings["chat_template"] = Path(job.settings.chat_template).name
    return {
        "created_by": f"sculptor {__version__}",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "safetensors": safetensors.__version__,
        },
        "command": "train",
        "settings": settings,
        # Names and digests: a record is published, and somebody's folders are nobody's business.
        "data": {"files": list(job.data), "rows_sha256": job.rows_digest}
        | ({} if mixture is None else asdict(mixture)),
        "base": {"name": job.checkpoint.path.resolve().name, "identity": job.archive.manifest.base_identity},
        "lineage": [*map(asdict, lineage), asdict(merge_of(job.checkpoint, job.archive, saved, report.opened))],
        "analyzed": analyzed,  # whether the archive that protected it was made for it, and lies beside it
        "also_trained": list(report.also_trained),
        "not_targeted": [asdict(item) for item in report.not_targeted],
        "frozen": list(report.frozen),
        "examples": {"rows": report.num_examples, "dropped": report.num_dropped, "cut": report.num_cut},
        "num_trainable": report.num_trainable,
        "rose": report.rose,
        "result": asdict(report.loop),
        "matrices": {name: asdict(matrix) for name, matrix in report.matrices.items()},
    }
