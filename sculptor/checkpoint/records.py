"""sculptor.json, as far as later runs read it: what a checkpoint's making says of its lineage."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD_NAME = "sculptor.json"


@dataclass(frozen=True, slots=True)
class MakingRecord:
    """Facts a checkpoint carries from the runs that made it; empty for any other checkpoint.

    Attributes:
        lineage: base identities of the archives it was trained with, oldest first: one per merge.
        also_trained: tensors that some of these runs trained without protection.
    """

    lineage: tuple[str, ...] = ()
    also_trained: tuple[str, ...] = ()

    def merges_since(self, base_identity: str) -> int:
        """How often the checkpoint was rounded since a base; 1 if the base is not in its lineage."""
        return len(self.lineage) - self.lineage.index(base_identity) if base_identity in self.lineage else 1


def read_record(checkpoint: Path) -> MakingRecord:
    """The record of a checkpoint directory; a missing or foreign file gives an empty one."""
    try:
        content: Any = json.loads((checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return MakingRecord()
    if not isinstance(content, Mapping):
        return MakingRecord()
    return MakingRecord(tuple(content.get("lineage", ())), tuple(content.get("also_trained", ())))
