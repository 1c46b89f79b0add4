"""What an optimizer step does with the gradients: clipping, AdamW, folding; with everything on the device.

`sculptor.training.streamed` does the same while only one block is there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.archive.store import Archive, Subspaces
from sculptor.training.coordinates import merge_update
from sculptor.training.protect import ProtectedBlock, merge_weight, softening
from sculptor.training.settings import TrainSettings

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False, slots=True)
class Tensors:
    """Tensors that are read one at a time: name -> (dtype, shape), and what reads one to the CPU."""

    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    read: Callable[[str], Tensor]


class Updates(ABC):
    """The trained parameters, by name (coordinates are `<tensor>.A<i>`), and their optimizer.

    Attributes:
        extra: openly trained parameters of the model, by name.
        settings: resolved settings.
    """

    extra: dict[str, nn.Parameter]
    settings: TrainSettings

    @property
    @abstractmethod
    def num_trainable(self) -> int:
        """How many numbers are trained."""

    @abstractmethod
    def fingerprints(self) -> dict[str, list[float]]:
        """Of the bases of every matrix: coordinates mean nothing in others."""

    @abstractmethod
    def begin(self, rate: float) -> None:
        """The backward pass of a micro-batch follows; `rate` is the step's learning rate."""

    @abstractmethod
    def end_backward(self) -> None:
        """It is over."""

    @abstractmethod
    def clip(self) -> float:
        """Clips the gradients as the settings say; returns their norm before."""

    @abstractmethod
    def step(self, rate: float) -> None:
        """Changes the parameters, and forgets the gradients."""

    @abstractmethod
    def parameters(self) -> Tensors:
        """The trained parameters as they are."""

    @abstractmethod
    def state(self) -> Tensors:
        """The trained parameters and the optimizer's state."""

    @abstractmethod
    def load(self, saved: Mapping[str, Tensor], *, optimizer: bool) -> None:
        """Puts back what `parameters`, or with `optimizer` what `state` gave."""

    @abstractmethod
    def coordinates(self, name: str) -> list[Tensor] | None:
        """The coordinates of a matrix, on the device; None if it has none."""

    def settle(self) -> None:  # noqa: B027 - nothing that could go before the end
        """Training is over: gives back what only a forward pass needs, not the trained values."""

    def close(self) -> None:  # noqa: B027 - nothing to do where nothing waits elsewhere
        """Gives back the memory of everything; the parameters are gone."""


@dataclass(frozen=True, eq=False, slots=True)
class TrainedParameters:
    """What the optimizer works on, by name: coordinates per block, and openly trained parameters."""

    blocks: tuple[ProtectedBlock, ...]
    extra: dict[str, nn.Parameter]

    def named(self) -> dict[str, nn.Parameter]:
        """All of them; coordinates are `<tensor>.A<i>`."""
        coordinates = {
            f"{matrix.coordinates.name}.A{i}": a
            for block in self.blocks
            for matrix in block.matrices
            for i, a in enumerate(matrix.coordinates.blocks)
        }
        return coordinates | self.extra

    def groups(self) -> list[list[nn.Parameter]]:
        """What is clipped together when matrices are clipped one by one."""
        matrices = [list(matrix.coordinates.blocks) for block in self.blocks for matrix in block.matrices]
        return [*matrices, *([value] for value in self.extra.values())]

    def refresh(self) -> None:
        """Folds every matrix again, block by block."""
        for block in self.blocks:
            for matrix in block.matrices:
                matrix.refresh()


class ResidentUpdates(Updates):
    """For a model that `protect(fold="manual")` has been called on, with all of it on the device.

    Args:
        parameters: what is trained.
        settings: resolved settings.
        device: where the model is.
    """

    def __init__(self, parameters: TrainedParameters, settings: TrainSettings, device: torch.device) -> None:
        self.trained = parameters
        self.extra = parameters.extra
        self.settings = settings
        self.optimizer = make_optimizer(
            [block.parameters for block in parameters.blocks], list(parameters.extra.values()), settings, device
        )
        self._named = parameters.named()
        self._coordinates = {
            matrix.coordinates.name: matrix.coordinates for block in parameters.blocks for matrix in block.matrices
        }

    @property
    def num_trainable(self) -> int:
        return sum(a.numel() for a in self._named.values())

    def fingerprints(self) -> dict[str, list[float]]:
        return {name: coordinates.fingerprint() for name, coordinates in self._coordinates.items()}

    def begin(self, rate: float) -> None:
        """Gradients add up in the parameters themselves."""

    def end_backward(self) -> None:
        """Gradients add up in the parameters themselves."""

    def clip(self) -> float:
        together = [list(self._named.values())] if self.settings.clip_by == "model" else self.trained.groups()
        gradients = [found for group in together if (found := [a.grad for a in group if a.grad is not None])]
        norms = [nn.utils.get_total_norm(group) for group in gradients]
        if self.settings.clip:
            for group, norm in zip(gradients, norms, strict=True):
                torch._foreach_div_(group, divisor(norm, self.settings.clip))
        return float(norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms))

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trained.refresh()

    def parameters(self) -> Tensors:
        return tensors_of(self._named)

    def state(self) -> Tensors:
        return tensors_of(with_state(self._named, self.optimizer))

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor], *, optimizer: bool) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(saved[name])
        if optimizer:
            load_state(self._named, self.optimizer, saved)
        self.trained.refresh()

    def coordinates(self, name: str) -> list[Tensor] | None:
        found = self._coordinates.get(name)
        return None if found is None else list(found.blocks)

    def close(self) -> None:
        self.optimizer.state.clear()
        for coordinates in self._coordinates.values():
            coordinates.release()


def merge_trained(
    updates: Updates, archive: Archive, found: Subspaces, weight: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """A matrix as training leaves it: the tensor to save, on the CPU, and dW (m, n) in float64; None if it was not trained.

    Args:
        updates: what trained it.
        archive: that it was trained with.
        found: its entry there, read.
        weight: W0 as stored.
        dtype: to save in.
        device: where to compute.

    Raises:
        TrainingError: if the bases complete differently than in training, or the sum does not fit the dtype.
    """
    coordinates = updates.coordinates(found.record.name)
    if coordinates is None:
        return None
    strength = updates.settings.soften
    gains = softening(archive, found, strength, device) if strength else None
    update = merge_update(found, gains, coordinates, updates.fingerprints()[found.record.name])
    return merge_weight(found.record, update, weight.to(device), dtype).cpu(), update


def divisor(norm: Tensor, limit: float) -> Tensor:
    """What gradients with this norm are divided by, so that it is at most `limit`.

    As `torch.nn.utils.clip_grad_norm_` has it, the other way round: AdamW can divide gradients as it reads them.
    """
    return torch.clamp((norm + 1e-6) / limit, min=1.0)


def make_optimizer(
    blocks: Iterable[Sequence[nn.Parameter]],
    extra: Sequence[nn.Parameter],
    settings: TrainSettings,
    device: torch.device,
) -> torch.optim.AdamW:
    """Fused AdamW, one group per block, so that a block's state is a unit; weight decay on coordinates only."""
    groups: list[dict[str, Any]] = [{"params": list(block), "weight_decay": settings.weight_decay} for block in blocks]
    if extra:
        groups.append({"params": list(extra), "weight_decay": 0.0})
    fused = device.type in ("cpu", "cuda")
    assert settings.learning_rate is not None
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=fused)


def with_state(named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and what the optimizer keeps of each, by `<name>` and `<name>.<key>`."""
    found: dict[str, Tensor] = {}
    for name, parameter in named.items():
        found[name] = parameter
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    return found


def load_state(
    named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """The inverse, for the optimizer's part."""
    for name, parameter in named.items():
        for key in ("step", *MOMENTS):
            if f"{name}.{key}" not in saved:  # no gradient ever reached it
                continue
            value = saved[f"{name}.{key}"]
            # Fused AdamW keeps its step counter on the device, the others on the CPU.
            on_device = key != "step" or optimizer.defaults["fused"]
            optimizer.state[parameter][key] = value.to(parameter.device) if on_device else value


def tensors_of(found: Mapping[str, Tensor]) -> Tensors:
    """Tensors that are all there."""
    return Tensors(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()},
        lambda name: found[name].detach().cpu().contiguous(),
    )
