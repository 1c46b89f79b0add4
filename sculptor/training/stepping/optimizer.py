"""AdamW as every way of training uses it: groups, rates, gradients of several processes, and state by name.

`BayesAdam` is AdamW whose step each number takes the less of, the surer it is (`sculptor.numerics.posterior`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import adamw

from sculptor.numerics.posterior import gain_, shares
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.world import World

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")
PRECISION = "precision"
# Numbers whose moments are widened at a time: few launches on a GPU; on a CPU they stay in its cache.
_PIECE = {"cuda": 2**24, "cpu": 2**17}


class Group(NamedTuple):
    """Parameters that share a peak learning rate and a weight decay."""

    parameters: Sequence[nn.Parameter]
    peak: float
    weight_decay: float = 0.0


class AdamW(torch.optim.AdamW):
    """torch's, told what torch would find out for every group anew: each matrix has a rate, and so a group, of its own.

    Moments in bfloat16 are widened to float32, piece by piece, for each step. They are rounded to nearest: at most by 2^-8 a
    step. Since an average forgets a tenth (`exp_avg`) or a twentieth (`exp_avg_sq`) a step, it does not stall by that, and
    errors add up to 4 and 8 % of it at most; a step reads the root of the second. Dettmers et al. (arXiv 2110.02861) go down
    to 8 bits.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], dtype: torch.dtype, **options: Any) -> None:
        self.dtype = dtype
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """As torch has it."""
        assert closure is None
        if self.dtype == torch.float32 and not self.defaults["fused"]:
            return super().step()
        groups = [([a for a in group["params"] if a.grad is not None], group) for group in self.param_groups]
        every = [a for given, _ in groups for a in given]
        for a in every:
            if "step" not in self.state[a]:
                self._make_state(a)
        if self.dtype != torch.float32:
            for given, group in groups:
                for piece in _pieces(given, self.state):
                    self._step(piece, group)
        if every:
            torch._foreach_add_([self.state[a]["step"] for a in every], 1)
        if self.dtype == torch.float32:
            for given, group in groups:
                self._step_at_once(given, group)
        return None

    def _step_at_once(self, given: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        """Parameters whose steps are counted already."""
        for dtype in dict.fromkeys(a.dtype for a in given):
            alike = [a for a in given if a.dtype == dtype]
            states = [self.state[a] for a in alike]
            torch._fused_adamw_(
                list[Tensor](alike),
                [a.grad for a in alike if a.grad is not None],  # as all have one
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=getattr(self, "grad_scale", None),
            )

    def _make_state(self, a: nn.Parameter) -> None:
        kept = self.state[a]
        if "step" not in kept:
            kept["step"] = torch.zeros((), device=a.device if self.defaults["fused"] else "cpu")
        for moment in MOMENTS:
            if moment not in kept:
                kept[moment] = torch.zeros_like(a, dtype=a.dtype if self.dtype == torch.float32 else self.dtype)

    def _step(self, piece: Sequence["_Stretch"], group: dict[str, Any]) -> None:
        wide = [[moment.float() for moment in (s.exp_avg, s.exp_avg_sq)] for s in piece]
        scale = getattr(self, "grad_scale", None)
        adamw.adamw(
            [s.a for s in piece],
            [s.gradient for s in piece],
            [first for first, _ in wide],
            [second for _, second in wide],
            [],
            [s.step.clone() for s in piece],  # counted once for all pieces
            fused=group["fused"],
            grad_scale=scale,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        narrow = [moment for s in piece for moment in (s.exp_avg, s.exp_avg_sq)]
        torch._foreach_copy_(narrow, [moment for both in wide for moment in both])


class _Stretch(NamedTuple):
    """Numbers of a parameter that lie in a row, with what is kept of them."""

    a: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def _pieces(parameters: Sequence[nn.Parameter], state: Mapping[Any, Mapping[str, Tensor]]) -> Iterator[list[_Stretch]]:
    """All of them, as many as are stepped at a time; a large one in several pieces."""
    piece: list[_Stretch] = []
    numbers = 0
    for a in parameters:
        assert a.grad is not None
        most = _PIECE.get(a.device.type, _PIECE["cuda"])
        kept = state[a]
        flat = (a.data.view(-1), a.grad.view(-1), *(kept[moment].view(-1) for moment in MOMENTS))
        for value, gradient, first, second in zip(*(torch.split(each, most) for each in flat), strict=True):
            if piece and numbers + value.numel() > most:
                yield piece
                piece, numbers = [], 0
            piece.append(_Stretch(value, gradient, first, second, kept["step"]))
            numbers += value.numel()
    if piece:
        yield piece


class BayesAdam(AdamW):
    """AdamW, of whose step each number takes the share (sigma / sigma_0)^2, as its sigma is before the step.

    `evidence` is what a gradient of 1 adds to the precision.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], dtype: torch.dtype, evidence: float, **options: Any) -> None:
        self.evidence = evidence
        super().__init__(groups, dtype, **options)

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


def moments_of(settings: TrainSettings) -> dict[str, torch.dtype]:
    """What the optimizer keeps of each number, by name, and in which dtype."""
    kept = dict.fromkeys(MOMENTS, _dtype(settings))
    return kept | {PRECISION: torch.float32} if settings.optimizer == "bayes-adam" else kept


def kept_bytes(settings: TrainSettings) -> int:
    """Of each trained number, beside it."""
    return sum(dtype.itemsize for dtype in moments_of(settings).values())


def _dtype(settings: TrainSettings) -> torch.dtype:
    return torch.bfloat16 if settings.optimizer_dtype == "bfloat16" else torch.float32


def make_optimizer(groups: Sequence[Group], device: torch.device, settings: TrainSettings, num_trained: int) -> AdamW:
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
        return BayesAdam(made, _dtype(settings), settings.evidence * num_trained, **options)
    return AdamW(made, _dtype(settings), **options)


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


def load_state(named: Mapping[str, nn.Parameter], optimizer: AdamW, saved: Mapping[str, Tensor]) -> None:
    """The inverse, for the optimizer's part."""
    for name, parameter in named.items():
        for key in ("step", *MOMENTS, PRECISION):
            if f"{name}.{key}" not in saved:  # no gradient ever reached it
                continue
            value = saved[f"{name}.{key}"]
            # Fused AdamW keeps its step counter on the device, the others on the CPU.
            on_device = key != "step" or optimizer.defaults["fused"]
            dtype = optimizer.dtype if key in MOMENTS else value.dtype
            optimizer.state[parameter][key] = value.to(parameter.device, dtype) if on_device else value


def optimizer_on_host(settings: TrainSettings, tier: str, device: torch.device) -> bool:
    """Whether AdamW runs in host memory: where the moments wait there, unless it runs within the backward pass."""
    possible = tier == "cpu" and settings.optimizer_mode == "exact"
    if settings.optimizer_on == "auto":
        return possible and device.type == "cuda"
    return possible and settings.optimizer_on == "host"
