"""sculptor.json of a trained checkpoint: how it came about."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from sculptor import __version__
from sculptor.checkpoint.records import Merge
from sculptor.checkpoint.tensors import dtype_name
from sculptor.checkpoint.writer import output_dtype
from sculptor.tasks.job import TrainJob
from sculptor.tasks.train_report import TrainReport


def training_record(
    job: TrainJob, report: TrainReport, lineage: Sequence[Merge], saved: torch.dtype | None
) -> dict[str, Any]:
    """The record of a run, its lineage longer by one merge."""
    import accelerate
    import safetensors
    import transformers

    dtypes: Any = {
        name: dtype_name(output_dtype(job.checkpoint.infos[record.tensor].dtype, saved))
        for name, record in job.archive.items()
    }
    merge = Merge({name: record.base_digest for name, record in job.archive.items()}, dtypes)
    return {
        "created_by": f"sculptor {__version__}",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "safetensors": safetensors.__version__,
        },
        "command": "train",
        "settings": asdict(job.settings),
        "data": list(job.data),
        "base": str(job.checkpoint.path),
        "lineage": [*map(asdict, lineage), asdict(merge)],
        "also_trained": list(report.also_trained),
        "not_targeted": [asdict(item) for item in report.not_targeted],
        "frozen": list(report.frozen),
        "examples": {"rows": report.num_examples, "dropped": report.num_dropped, "cut": report.num_cut},
        "num_trainable": report.num_trainable,
        "rose": report.rose,
        "result": asdict(report.loop),
        "matrices": {name: asdict(matrix) for name, matrix in report.matrices.items()},
    }
