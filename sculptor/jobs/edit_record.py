"""What a checkpoint that was edited tells of itself: sculptor.json, and norms by role."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sculptor.archive.store import Archive
from sculptor.checkpoint.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from sculptor.checkpoint.directory import published_name
from sculptor.checkpoint.reader import Checkpoint, identity, part_name
from sculptor.checkpoint.records import Merge, read_record
from sculptor.checkpoint.tensors import digest, dtype_name
from sculptor.edits.difference import Edited, Where
from sculptor.edits.pairs import Pairs
from sculptor.jobs.edit_report import EditReport, RoleChange, Tally
from sculptor.jobs.readme import Readme, code
from sculptor.jobs.record import record_head


@dataclass(eq=False)
class Making:
    """What is noted of every tensor while it is edited: norms, digests of what was read, dtypes of what is written."""

    pairs: Pairs
    tally: Tally = field(default_factory=Tally)
    base: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, Any] = field(default_factory=dict)

    def note(self, where: Where, base: Tensor, tuned: Tensor, factor: float, edited: Edited) -> None:
        """One tensor, or a slice of one."""
        name = part_name(where.name, where.part)
        self.tally.add(where.place.role, where.name, edited.norms)
        self.base[name] = digest(base)
        if isinstance(self.pairs.tuned, Checkpoint):
            self.tuned[name] = digest(tuned)
        if factor:
            self.rounded[name] = (self.base if self.pairs.source is self.pairs.base else self.tuned)[name]
            self.dtypes[name] = dtype_name(edited.tensor.dtype)

    def inputs(self) -> dict[str, Any]:
        """Both by name and digest."""
        base, tuned = self.pairs.base, self.pairs.tuned
        found = _adapter_digests(tuned) if isinstance(tuned, Adapter) else self.tuned
        kind = "adapter" if isinstance(tuned, Adapter) else "checkpoint"
        return {
            "base": {"name": published_name(base.path), "identity": identity(self.base)},
            "tuned": {"name": published_name(tuned.path), "kind": kind, "identity": identity(found)},
        }


def _adapter_digests(adapter: Adapter) -> Mapping[str, str]:
    return {
        name: hashlib.sha256((adapter.path / name).read_bytes()).hexdigest() for name in (CONFIG_NAME, WEIGHTS_NAME)
    }


def edit_record(
    making: Making, report: EditReport, archive: Archive | None, saved: torch.dtype | None, data: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of an edit; the lineage of what was copied, longer by one rounding.

    Args:
        making: what was noted.
        report: its result.
        archive: that was projected onto, if any.
        saved: dtype that everything was cast to, if any.
        data: names and digests of what numbers were chosen by.
    """
    before = read_record(making.pairs.source.path)
    settings: dict[str, Any] = dict(report.numbers)
    settings["save_dtype"] = "keep" if saved is None else dtype_name(saved)
    return {
        **record_head(f"edit {report.command}"),
        "settings": settings,
        **making.inputs(),
        **({} if archive is None else {"archive": archive_facts(archive)}),
        "copied": report.copied,
        "lineage": [*map(asdict, before.lineage), asdict(Merge(making.rounded, making.dtypes))],
        "also_trained": list(before.also_trained),
        "roles": [asdict(role) for role in (*report.roles, report.all)],
        **({} if report.choice is None else {"choice": asdict(report.choice) | dict(data)}),
    }


def archive_facts(archive: Archive) -> dict[str, Any]:
    """An archive by name and digest."""
    return {"name": archive.path.resolve().name, "identity": archive.identity}


# What was done with TUNED, for the title.
_DONE = {
    "lines": "with a part of the difference to {tuned}, by depth",
    "interpolate": "on the way to {tuned}",
    "project": "with what is free of the difference to {tuned}",
    "threshold": "with the large singular values of the difference to {tuned}",
}


def edit_readme(making: Making, report: EditReport, archive: Archive | None, data: Mapping[str, Any]) -> Readme:
    """What the model card of an edit tells."""
    base, tuned = making.pairs.base, making.pairs.tuned
    done = _DONE[report.command].format(tuned=code(published_name(tuned.path)))
    numbers = [(name, f"{value:.4g}") for name, value in report.numbers.items() if isinstance(value, float)]
    files = [name for each in data.values() for name in each["files"]]
    return Readme(
        bases=(base.path, tuned.path) if isinstance(tuned, Checkpoint) else (base.path,),
        done=done,
        summary=f"Made without training by `sculptor edit {report.command}`: {code(published_name(base.path))} {done}.",
        tags=("model-editing", "merge"),
        figures=[*numbers, *_stays(report.all)],
        data=tuple(files),
        check="" if archive is None else archive_check(base, archive),
    )


def archive_check(base: Checkpoint, archive: Archive) -> str:
    """How what was projected onto an archive is verified."""
    return (
        f"With `BASE` a copy of {code(published_name(base.path))}, `THIS` this model, and `ARCHIVE` the subspace archive "
        f"{code(published_name(archive.path))} of it (identity `{archive.identity}`):\n\n"
        "```sh\nsculptor verify BASE THIS --subspaces ARCHIVE\n```"
    )


def _stays(change: RoleChange) -> list[tuple[str, str]]:
    return [
        ("difference between the two", f"{100 * change.difference:.2f} % of the norm of the base"),
        ("of it in this model", f"{100 * change.stays:.1f} %"),
    ]
