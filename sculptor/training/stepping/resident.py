"""An optimizer step with everything on the device: clipping, AdamW, folding."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sculptor.training.protect import ProtectedBlock
from sculptor.training.rates import Peaks
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.clipping import divisor
from sculptor.training.stepping.optimizer import (
    Group,
    add_up_gradients,
    extra_groups,
    join_groups,
    load_state,
    make_optimizer,
    set_rates,
    with_state,
)
from sculptor.training.stepping.updates import LazyTensors, Updates, tensors_of
from sculptor.world import ALONE, World


@dataclass(frozen=True, eq=False, slots=True)
class TrainedParameters:
    """What the optimizer works on, by name: coordinates per block, and openly trained parameters."""

    blocks: tuple[ProtectedBlock, ...] = ()
    extra: dict[str, nn.Parameter] = field(default_factory=dict)

    def named(self) -> dict[str, nn.Parameter]:
        """All of them; coordinates are `<matrix>.A<i>`."""
        coordinates = {
            f"{matrix.coordinates.name}.A{i}": a
            for block in self.blocks
            for matrix in block.matrices
            for i, a in enumerate(matrix.coordinates.values)
        }
        return coordinates | self.extra

    def by_matrix(self) -> list[list[nn.Parameter]]:
        """What is clipped together when matrices are clipped one by one."""
        matrices = [list(matrix.coordinates.values) for block in self.blocks for matrix in block.matrices]
        return [*matrices, *([value] for value in self.extra.values())]

    def groups(self, peaks: Peaks, weight_decay: float) -> list[Group]:
        """Block by block, so that a block's state is a unit, with what is trained openly last."""
        found: list[Group] = []
        for block in self.blocks:
            matrices = [matrix.coordinates for matrix in block.matrices]
            found += join_groups([Group(list(m.values), peaks.matrices[m.name], weight_decay) for m in matrices])
        return found + extra_groups(self.extra, peaks.extra)

    def refresh(self) -> None:
        """Has every matrix folded again when it is next read."""
        for block in self.blocks:
            for matrix in block.matrices:
                matrix.refresh()


class ResidentUpdates(Updates):
    """For a model that `protect(fold="manual")` has been called on, with all of it on the device.

    Args:
        parameters: what is trained.
        peaks: their learning rates.
        settings: resolved settings.
        device: where the model is.
        world: the processes that share a step.
    """

    def __init__(
        self,
        parameters: TrainedParameters,
        peaks: Peaks,
        settings: TrainSettings,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.trainable = parameters
        self.extra = parameters.extra
        self.settings = settings
        self.world = world
        self._named = parameters.named()
        groups = parameters.groups(peaks, settings.weight_decay)
        self.optimizer = make_optimizer(groups, device, settings, self.num_trainable)
        self._coordinates = {
            matrix.coordinates.name: matrix.coordinates for block in parameters.blocks for matrix in block.matrices
        }

    @property
    def num_trainable(self) -> int:
        return sum(a.numel() for a in self._named.values())

    def fingerprints(self) -> dict[str, list[float]]:
        return {name: coordinates.fingerprint() for name, coordinates in self._coordinates.items()}

    def resident(self) -> list[nn.Parameter]:
        return list(self._named.values())

    def refresh(self) -> None:
        self.trainable.refresh()

    def begin(self, rate_of: RateOf) -> None:
        """Gradients add up in the parameters themselves."""

    def pass_by(self) -> None:
        """A process has all of the model."""

    def clip(self) -> float:
        add_up_gradients(list(self._named.values()), self.world)
        together = [list(self._named.values())] if self.settings.clip_by == "model" else self.trainable.by_matrix()
        gradients = [found for group in together if (found := [a.grad for a in group if a.grad is not None])]
        norms = [nn.utils.get_total_norm(group) for group in gradients]
        if self.settings.clip:
            for group, norm in zip(gradients, norms, strict=True):
                torch._foreach_div_(group, divisor(norm, self.settings.clip))
        return float(norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms))

    def step(self, rate_of: RateOf) -> None:
        set_rates(self.optimizer, rate_of)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainable.refresh()

    def parameters(self) -> LazyTensors:
        return tensors_of(self._named)

    def state(self) -> LazyTensors:
        return tensors_of(with_state(self._named, self.optimizer))

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor], *, optimizer: bool) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(saved[name])
        if optimizer:
            load_state(self._named, self.optimizer, saved)
        self.trainable.refresh()

    def coordinates(self, name: str) -> list[Tensor] | None:
        found = self._coordinates.get(name)
        return None if found is None else list(found.values)

    def close(self) -> None:
        self.optimizer.state.clear()
        for coordinates in self._coordinates.values():
            coordinates.release()
