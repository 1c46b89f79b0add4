"""AdamW as every way of training uses it: groups, rates, gradients of several processes, and state by name.

`BayesAdam` is AdamW whose step each number takes the less of, the surer it is (`sculptor.numerics.posterior`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sculptor.numerics.posterior import gain_, shares
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.world import World

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")
PRECISION = "precision"


class Group(NamedTuple):
    """Parameters that share a peak learning rate and a weight decay."""

    parameters: Sequence[nn.Parameter]
    peak: float
    weight_decay: float = 0.0


class BayesAdam(torch.optim.AdamW):
    """AdamW, of whose step each number takes the share (sigma / sigma_0)^2, as its sigma is before the step.

    `evidence` is what a gradient of 1 adds to the precision.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], evidence: float, **options: Any) -> None:
        self.evidence = evidence
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """As AdamW's, and then the precision that the gradient adds."""
        assert closure is None
        before = {a: a.clone() for group in self.param_groups for a in group["params"] if a.grad is not None}
        super().step()
        for a, old in before.items():
            precision = self.state[a].setdefault(PRECISION, torch.zeros_like(a))
            a.copy_(torch.lerp(old, a, shares(precision)))
            gain_(precision, a.grad, self.evidence)  # divided, where AdamW was to divide it


def moments_of(settings: TrainSettings) -> tuple[str, ...]:
    """What the optimizer keeps of each number, by name."""
    return (*MOMENTS, PRECISION) if settings.optimizer == "bayes-adam" else MOMENTS


def make_optimizer(
    groups: Sequence[Group], device: torch.device, settings: TrainSettings, num_trained: int
) -> torch.optim.AdamW:
    """Fused, as the settings say.

    Args:
        groups: what it steps.
        device: where.
        settings: resolved.
        num_trained: how many numbers are trained in all: evidence is for the average of them, in a gradient of norm 1.
    """
    made: list[dict[str, Any]] = [
        {"params": list(group.parameters), "lr": group.peak, "peak": group.peak, "weight_decay": group.weight_decay}
        for group in groups
        if group.parameters
    ]
    options: Any = {"lr": 1.0, "betas": BETAS, "fused": device.type in ("cpu", "cuda")}
    if settings.optimizer == "bayes-adam":
        assert settings.evidence is not None
        return BayesAdam(made, settings.evidence * num_trained, **options)
    return torch.optim.AdamW(made, **options)


def set_rates(optimizer: torch.optim.Optimizer, rate_of: RateOf) -> None:
    """Every group's rate for a step."""
    for group in optimizer.param_groups:
        group["lr"] = rate_of(group["peak"])


def join_groups(groups: Sequence[Group]) -> list[Group]:
    """Groups of the same peak and decay as one: fewer passes of the optimizer."""
    joined: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in groups:
        joined.setdefault((group.peak, group.weight_decay), []).extend(group.parameters)
    return [Group(parameters, *key) for key, parameters in joined.items()]


def extra_groups(extra: Mapping[str, nn.Parameter], peaks: Mapping[str, float]) -> list[Group]:
    """Openly trained parameters, without weight decay."""
    return join_groups([Group([value], peaks[name]) for name, value in extra.items()])


def add_up_gradients(values: Sequence[nn.Parameter], world: World) -> None:
    """Gradients of all processes; where one has none, it counts as 0, and where none has one there is none."""
    if world.size == 1 or not values:
        return
    reached = torch.tensor([a.grad is not None for a in values], dtype=torch.int32, device=values[0].device)
    world.add_up([reached])
    there = [a for a, count in zip(values, reached.tolist(), strict=True) if count]
    for a in there:
        if a.grad is None:
            a.grad = torch.zeros_like(a)
    world.add_up([a.grad for a in there if a.grad is not None])


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
        for key in ("step", *MOMENTS, PRECISION):
            if f"{name}.{key}" not in saved:  # no gradient ever reached it
                continue
            value = saved[f"{name}.{key}"]
            # Fused AdamW keeps its step counter on the device, the others on the CPU.
            on_device = key != "step" or optimizer.defaults["fused"]
            optimizer.state[parameter][key] = value.to(parameter.device) if on_device else value


def optimizer_on_host(settings: TrainSettings, tier: str, device: torch.device) -> bool:
    """Whether AdamW runs in host memory: where the moments wait there, unless it runs within the backward pass."""
    possible = tier == "cpu" and settings.optimizer_mode == "exact"
    if settings.optimizer_on == "auto":
        return possible and device.type == "cuda"
    return possible and settings.optimizer_on == "host"
