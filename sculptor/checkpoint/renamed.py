"""Two checkpoints of one model under the same names: saving may name tensors anew, and leaves out what the model does not read."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sculptor.checkpoint.places import find_places
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tensors import TensorInfo, digest
from sculptor.errors import CheckpointError

# Of a configuration, what transformers 5 tells in another place.
_MOVED = ("rope_theta", "rope_scaling")
_SHOWN = 3


class Common(NamedTuple):
    """Two checkpoints under the names of the first.

    Attributes:
        base, other: both.
        renamed: what the second calls a tensor -> what the first does, where these differ; `parameters` what the model does.
        left_out: tensors of the first that the second lacks, and the model does not read or has elsewhere.
    """

    base: Checkpoint
    other: Checkpoint
    renamed: Mapping[str, str] = {}
    left_out: Sequence[str] = ()
    parameters: Mapping[str, str] = {}

    def mixed(self) -> str | None:
        """What is renamed as saving never does: to no name that the model has, or in a part of it alone; None if nothing is.

        Programs that take off or add one prefix for all find random weights there.
        """
        for new, parameter in self.parameters.items():
            if not f".{parameter}".endswith(f".{new}"):
                return f"{new} stands for {self.renamed[new]}, and is no name that the model has ({parameter})"
        if not self.renamed:
            return None
        old_names = set(self.renamed.values())
        kept = [_parts(name) for name in self.other.infos if name in self.base.infos and name not in old_names]
        for new, old in self.renamed.items():
            lead, known = _place(old, new)
            alike = next((name for name in kept if name[: len(lead)] == lead), None)
            if alike is not None:
                return f"{new} stands for {old}, where {'.'.join(alike)} is named as before ({'.'.join(known)})"
        return None


def _parts(name: str) -> list[str]:
    """Of a name, between dots; of a number only that it is one."""
    return [re.sub(r"\d+", "N", part) for part in name.split(".")]


def _place(old: str, new: str) -> tuple[list[str], list[str]]:
    """The start of an old name up to what is another in the new one, or up to the part before which something was added."""
    before, now = old.split("."), new.split(".")
    same = 0
    while same < min(len(before), len(now)) and before[-1 - same] == now[-1 - same]:
        same += 1
    changed = before[: len(before) - same] or before[:1]
    return _parts(".".join(changed)), changed


def in_common_names(base: Checkpoint, other: Checkpoint) -> Common:
    """Both as far as they can be told to be alike, the second under the names of the first.

    Of the first are left out, where the second lacks them, tensors that no parameter is made of (buffers of older versions,
    another task's head), and second ones of tied parameters that are the same bytes. What does not fit stays as it is.

    Args:
        base: a checkpoint.
        other: what was saved of its model.
    """
    if base.infos.keys() == other.infos.keys():
        return Common(base, other)
    try:
        places, its = find_places(base), find_places(other)
    except CheckpointError:  # the model cannot be built, so nothing is known of names
        return Common(base, other)
    of_parameter: dict[str, list[str]] = defaultdict(list)
    for tensor, place in its.items():
        if place.whole and tensor not in base.infos:
            of_parameter[place.parameter].append(tensor)
    renamed: dict[str, str] = {}  # its name -> the base's
    left_out: set[str] = set()
    lacking = [name for name in base if name not in other.infos]
    for name in lacking:
        found = of_parameter.get(places[name].parameter, []) if name in places and places[name].whole else []
        if len(found) == 1 and found[0] not in renamed:
            renamed[found[0]] = name
    there = other.infos.keys() | set(renamed.values())
    for name in lacking:
        if name not in places:
            left_out.add(name)
        elif name not in there and places[name].whole:
            tied = [each for each in there & places.keys() if places[each].parameter == places[name].parameter]
            if any(digest(base[each]) == digest(base[name]) for each in tied):
                left_out.add(name)
    kept = {name: info for name, info in base.infos.items() if name not in left_out}
    named = {renamed.get(name, name): info for name, info in other.infos.items()}
    return Common(
        _with(base, kept),
        _with(other, named),
        renamed,
        tuple(sorted(left_out)),
        {name: its[name].parameter for name in renamed},
    )


def _with(checkpoint: Checkpoint, infos: dict[str, TensorInfo]) -> Checkpoint:
    """A checkpoint whose tensors have other names; where each is stays known."""
    view = copy.copy(checkpoint)
    view.infos = infos
    return view


def notes_of(base: Checkpoint, other: Checkpoint, common: Common | None) -> Iterator[str]:
    """What transformers loads as before, and older ones or other programs may not, one line each."""
    if common is not None and common.renamed:
        new, old = next(iter(common.renamed.items()))
        yield f"{len(common.renamed)} tensors have other names, first {new} for {old}, which not every program knows"
    if common is not None and common.left_out:
        more = f" and {len(common.left_out) - _SHOWN} more" if len(common.left_out) > _SHOWN else ""
        yield (
            f"left out of the base, which transformers does not load, or has elsewhere: {', '.join(common.left_out[:_SHOWN])}{more}"
        )
    for key in _MOVED:
        if base.config.get(key) is not None and key not in other.config:
            yield (
                f"config.json tells {key} in rope_parameters alone, as transformers 5 saves it; programs of before look for it "
                f"at the top, where it was {str(base.config[key])[:60]}"
            )
