"""Two checkpoints of one model under the same names: saving may name tensors anew, and leaves out what the model does not read."""

import copy
from collections import defaultdict

from sculptor.checkpoint.places import find_places
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tensors import TensorInfo, digest
from sculptor.errors import CheckpointError


def in_common_names(base: Checkpoint, other: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both as far as they can be told to be alike, the second under the names of the first.

    Of the first are left out, where the second lacks them, tensors that no parameter is made of (buffers of older versions,
    another task's head), and second ones of tied parameters that are the same bytes. What does not fit stays as it is.

    Args:
        base: a checkpoint.
        other: what was saved of its model.
    """
    if base.infos.keys() == other.infos.keys():
        return base, other
    try:
        places, its = find_places(base), find_places(other)
    except CheckpointError:  # the model cannot be built, so nothing is known of names
        return base, other
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
    return _with(base, kept), _with(other, {renamed.get(name, name): info for name, info in other.infos.items()})


def _with(checkpoint: Checkpoint, infos: dict[str, TensorInfo]) -> Checkpoint:
    """A checkpoint whose tensors have other names; where each is stays known."""
    view = copy.copy(checkpoint)
    view.infos = infos
    return view
