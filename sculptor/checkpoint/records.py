"""sculptor.json, as far as later runs read it: what a checkpoint's making says of its lineage."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sculptor.errors import CheckpointError
from sculptor.validation import FloatDtype, Name, Sha256, parse, read_file, read_json

RECORD_NAME = "sculptor.json"


@dataclass(frozen=True, slots=True)
class Merge:
    """One rounding in a checkpoint's past.

    Attributes:
        base_digests: tensor -> SHA-256 of what it was before; the matrices of the archive that was used.
        dtypes: tensor -> dtype that it was written in.
        opened: tensors that were trained without protection on the way.
    """

    base_digests: Mapping[Name, Sha256]
    dtypes: Mapping[Name, FloatDtype]
    opened: tuple[Name, ...] = ()


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


@dataclass(frozen=True, slots=True)
class _Settings:
    """Of the settings, what later runs look at."""

    save_dtype: Literal["keep", "float32", "bfloat16"] = "keep"


@dataclass(frozen=True, slots=True)
class _Record:
    """Of sculptor.json, what later runs look at; the rest is for people."""

    lineage: tuple[Merge, ...] = ()
    also_trained: tuple[Name, ...] = ()
    settings: _Settings = _Settings()


def read_record(checkpoint: Path) -> MakingRecord:
    """The record of a checkpoint directory; empty if there is none.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = checkpoint / RECORD_NAME
    if not path.is_file():
        return MakingRecord()
    remedy = "restore it, or remove it if the checkpoint is no output of sculptor"
    content = parse(read_file(path, CheckpointError, remedy), path, CheckpointError, remedy)
    found = read_json(_Record, json.dumps(content), path, CheckpointError, remedy)
    save_dtype = found.settings.save_dtype
    return MakingRecord(found.lineage, found.also_trained, None if save_dtype == "keep" else save_dtype)
