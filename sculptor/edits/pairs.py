"""Two checkpoints of one model, tensor by tensor: a base, and what tuning made of it, whole or as an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sculptor.checkpoint.adapter import Adapter, is_adapter
from sculptor.checkpoint.places import Place, find_places
from sculptor.checkpoint.reader import Checkpoint, Slice, find_directory, open_checkpoint
from sculptor.errors import EditError


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor in both: where it is, and its name in either."""

    place: Place
    base: str
    tuned: str


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """A base and a tuned checkpoint.

    Attributes:
        base, tuned: both.
        source: the one that is copied where nothing is edited; it names the tensors.
        by_name: its floating-point tensors, as far as they are of the model.
    """

    base: Checkpoint
    tuned: Checkpoint | Adapter
    source: Checkpoint
    by_name: Mapping[str, Pair]

    def read(self, name: str, part: int | None, old: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor, or a slice of one, before and after tuning.

        Args:
            name: in the source.
            part: of its first dimension, None for all of it.
            old: the source's own.

        Raises:
            CheckpointError: if one of the two has NaN or infinite values.
        """
        pair = self.by_name[name]
        mine = self.source.check_finite(Slice(name, part), old)
        other = self.tuned if self.source is self.base else self.base
        theirs = other.finite_matrix(Slice(pair.tuned if self.source is self.base else pair.base, part))
        return (mine, theirs) if self.source is self.base else (theirs, mine)


def open_pairs(base: str | Path, tuned: str | Path, *, copy_base: bool) -> Pairs:
    """Opens two checkpoints and finds out which tensors belong together.

    Args:
        base: directory or hub name.
        tuned: directory or hub name, of a checkpoint or a LoRA adapter.
        copy_base: whether the base is what is copied; it is for an adapter, too.

    Raises:
        CheckpointError: if one of them cannot be read.
        EditError: if they are not of one model.
    """
    before, path = open_checkpoint(base), find_directory(tuned)
    places = find_places(before)
    if is_adapter(path):
        adapter = Adapter(path, before, places)
        return Pairs(
            before, adapter, before, {name: Pair(places[name], name, name) for name in _floating(before, places)}
        )
    after = Checkpoint(path)
    places_after = find_places(after)
    mine, theirs = (before, after) if copy_base else (after, before)
    own, other = (places, places_after) if copy_base else (places_after, places)
    partners = _match(mine, own, theirs, other)
    return Pairs(
        before,
        after,
        mine,
        {
            name: Pair(own[name], *((name, partner) if copy_base else (partner, name)))
            for name, partner in partners.items()
        },
    )


def _floating(checkpoint: Checkpoint, places: Mapping[str, Place]) -> list[str]:
    return [name for name, info in checkpoint.infos.items() if name in places and info.dtype.is_floating_point]


def _check_floating(checkpoint: Checkpoint, name: str, other: Checkpoint) -> None:
    """Names a tensor that is there, and of whole numbers."""
    info = checkpoint.infos.get(name)
    if info is not None and not info.dtype.is_floating_point:
        dtype = str(info.dtype).removeprefix("torch.")
        raise EditError(
            f"{checkpoint.path}: {name} is {dtype}; an edit needs floating-point numbers, as {other.path} has"
        )


def _match(
    mine: Checkpoint, own: Mapping[str, Place], theirs: Checkpoint, other: Mapping[str, Place]
) -> dict[str, str]:
    """Tensor of `mine` -> that of `theirs`: of the same name, or loaded into the same parameter."""
    by_parameter = {
        parameter: name for name, place in other.items() if place.whole for parameter in (place.parameter, *place.tied)
    }
    found: dict[str, str] = {}
    for name in _floating(mine, own):
        partner = name if name in other else by_parameter.get(own[name].parameter) if own[name].whole else None
        _check_floating(theirs, partner or name, mine)
        if partner is None:
            raise EditError(
                f"{theirs.path}: no tensor for {name} of {mine.path}; an edit needs two checkpoints of one model"
            )
        if theirs.infos[partner].shape != mine.infos[name].shape:
            raise EditError(
                f"{theirs.path}: {partner} has shape {list(theirs.infos[partner].shape)}, {list(mine.infos[name].shape)} in "
                f"{mine.path}; an edit needs two checkpoints of one model"
            )
        found[name] = partner
    met = {other[partner].parameter for partner in found.values()}
    lost = [name for name in _floating(theirs, other) if other[name].parameter not in met]
    if lost:
        _check_floating(mine, lost[0], theirs)
        raise EditError(
            f"{mine.path}: no tensor for {lost[0]} of {theirs.path}; an edit needs two checkpoints of one model"
        )
    return found
