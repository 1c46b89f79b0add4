"""sculptor.json, as far as later runs read it: what a checkpoint's making says of its lineage."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD_NAME = "sculptor.json"


@dataclass(frozen=True, slots=True)
class Merge:
    """One rounding in a checkpoint's past.

    Attributes:
        base_digests: tensor -> SHA-256 of what it was before; the matrices of the archive that was used.
        dtypes: tensor -> dtype that it was written in.
    """

    base_digests: Mapping[str, str]
    dtypes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MakingRecord:
    """Facts a checkpoint carries from the runs that made it; empty for any other checkpoint.

    Attributes:
        lineage: every merge, oldest first.
        also_trained: tensors that some of these runs trained without protection.
        save_dtype: what the last run cast every tensor to; None if it kept dtypes.
    """

    lineage: tuple[Merge, ...] = ()
    also_trained: tuple[str, ...] = ()
    save_dtype: str | None = None

    def merges_since(self, base_digests: Mapping[str, str]) -> tuple[Merge, ...]:
        """The merges that lie between a base, told by the digests of its matrices, and the checkpoint."""
        for i, merge in enumerate(self.lineage):
            shared = merge.base_digests.keys() & base_digests.keys()
            if shared and all(merge.base_digests[name] == base_digests[name] for name in shared):
                return self.lineage[i:]
        return ()


def read_record(checkpoint: Path) -> MakingRecord:
    """The record of a checkpoint directory; a missing or foreign file gives an empty one."""
    try:
        content: Any = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
        lineage = tuple(Merge(**merge) for merge in content.get("lineage", ()))
        save_dtype = content.get("settings", {}).get("save_dtype", "keep")
        also_trained = tuple(map(str, content.get("also_trained", ())))
        return MakingRecord(lineage, also_trained, None if save_dtype == "keep" else save_dtype)
    except (OSError, ValueError, TypeError, AttributeError):
        return MakingRecord()
