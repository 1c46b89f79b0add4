"""What the loop asks of an optimizer, wherever parameters and gradients are: `resident.py` and `streamed.py` answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sculptor.archive.store import Entry
from sculptor.edits.merge import Merged, merge_matrix
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings


@dataclass(frozen=True, eq=False, slots=True)
class LazyTensors:
    """Tensors that are read one at a time: name -> (dtype, shape), and what reads one to the CPU."""

    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    read: Callable[[str], Tensor]


class Trained(ABC):
    """What a training leaves, whoever stepped: what is asked of it when its output is written.

    Attributes:
        extra: openly trained parameters of the model, by name.
        settings: resolved settings.
        owners: of matrices, which alone have their coordinates; empty where every process has all.
        goes_on: whether the model is still needed when the output is written.
    """

    extra: dict[str, nn.Parameter]
    settings: TrainSettings
    owners: Mapping[str, int] = MappingProxyType({})
    goes_on = False

    @property
    @abstractmethod
    def num_trainable(self) -> int:
        """How many numbers are trained."""

    @abstractmethod
    def fingerprints(self) -> dict[str, list[float]]:
        """Of the bases of every matrix: coordinates mean nothing in others."""

    @abstractmethod
    def coordinates(self, name: str) -> list[Tensor] | None:
        """The coordinates of a matrix, on the device; None if it has none here."""

    def precision(self) -> LazyTensors:
        """What the optimizer keeps from task to task, `<name>.precision`; nothing where it is AdamW."""
        return LazyTensors({}, lambda name: torch.empty(0))

    def release_model(self) -> None:  # noqa: B027 - nothing that could go before the end
        """Training is over: gives back what only a forward pass needs, not the trained values."""

    def close(self) -> None:  # noqa: B027 - nothing to do where nothing waits elsewhere
        """Gives back the memory of everything; the parameters are gone."""


class Updates(Trained):
    """The trained parameters, by name (coordinates are `<matrix>.A<i>`), and their optimizer."""

    def resident(self) -> list[nn.Parameter] | None:
        """All that is trained, if it is on the device with all of the model, and gradients add up there."""
        return None

    def refresh(self) -> None:
        """Has every weight folded again when it is next read."""

    @abstractmethod
    def begin(self, rate_of: RateOf) -> None:
        """The backward pass of a micro-batch follows, in a step of these rates."""

    @abstractmethod
    def pass_by(self) -> None:
        """It is over, or this process had no rows for it: does its part of what other processes have rows for."""

    @abstractmethod
    def clip(self) -> float:
        """Clips the gradients as the settings say; returns their norm before."""

    @abstractmethod
    def step(self, rate_of: RateOf) -> None:
        """Changes the parameters, and forgets the gradients."""

    @abstractmethod
    def parameters(self) -> LazyTensors:
        """The trained parameters as they are."""

    @abstractmethod
    def state(self) -> LazyTensors:
        """The trained parameters and the optimizer's state."""

    def precision(self) -> LazyTensors:
        """Of what the optimizer has stepped, in this task or before."""
        state = self.state()
        found = {name: entry for name, entry in state.entries.items() if name.endswith(".precision")}
        return LazyTensors(found, state.read)

    @abstractmethod
    def load(self, saved: Mapping[str, Tensor], *, optimizer: bool) -> None:
        """Puts back what `parameters`, or with `optimizer` what `state` gave."""

    def scale(self, factor: float, base: Mapping[str, Tensor]) -> None:
        """Scales the update of everything: coordinates, and openly trained parameters as far as they are from `base`."""
        now = self.parameters()
        self.load(_Scaled(now, factor, base), optimizer=False)


class _Scaled(Mapping[str, Tensor]):
    """Tensors moved towards those of a base, or 0, one at a time."""

    def __init__(self, tensors: LazyTensors, factor: float, base: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._factor = factor
        self._base = base

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors.read(name)
        if name not in self._base:
            return value * self._factor
        return self._base[name] + (value - self._base[name]) * self._factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.entries)

    def __len__(self) -> int:
        return len(self._tensors.entries)


def tensors_of(found: Mapping[str, Tensor]) -> LazyTensors:
    """Tensors that are all there."""
    return LazyTensors(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()},
        lambda name: found[name].detach().cpu().contiguous(),
    )


def merge_trained(updates: Trained, entry: Entry, weight: Tensor, dtype: torch.dtype) -> Merged | None:
    """A matrix as training leaves it, the tensor to save on the CPU; None if it was not trained.

    Args:
        updates: what trained it.
        entry: of the archive that it was trained with.
        weight: W0 as stored.
        dtype: to save in.

    Raises:
        TrainingError: if the bases complete differently than in training, or the sum does not fit the dtype.
    """
    name = entry.record.name
    coordinates = updates.coordinates(name)
    if coordinates is None:
        return None
    soften, fingerprint = updates.settings.soften or 0.0, updates.fingerprints()[name]
    made = merge_matrix(entry, coordinates, weight, dtype, soften=soften, fingerprint=fingerprint)
    return made._replace(tensor=made.tensor.cpu())
