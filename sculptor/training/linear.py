"""Linear maps that give the gradient of their weight as what it is the sum of, X and dY, where its rule has less to do with that.

A rule that leaves few directions free reads them from X or dY first: what is summed over tokens then is narrow, and a
full-size gradient never exists. Where a weight is read in any other way, autograd gives its gradient as ever.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sculptor.errors import TrainingError
from sculptor.methods.rule import Narrowing, OuterProduct, Rule

# Entries of the largest matrices, by type of device, that are taken together where they can be: launching kernels is what takes
# time there. Their gradients are full-size, in stacks and streamed alike, so that both round alike.
SMALL = {"cuda": 2**23}
# Takes X and dY; returns the gradients of what was wanted, if anything was.
Take = Callable[[OuterProduct], Sequence[Tensor | None]]


class _Saved(torch.autograd.Function):
    """Tensors that a backward pass will want, put by on their own.

    A function of torch's own puts by what it saves before it begins, others behind their end. When a block is computed again,
    that stops at the last tensor which somebody saved: before the block's last product, not behind it.
    """

    @staticmethod
    def forward(ctx: Any, trigger: Tensor, found: list[Any], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        found.append(ctx)
        return trigger.new_empty(0)

    @staticmethod
    def backward(ctx: Any, nothing: Tensor | None) -> tuple[None, ...]:
        return tuple(None for _ in ctx.needs_input_grad)


class _Linear(torch.autograd.Function):
    """`linear`, whose weight gets no gradient: what is `wanted` does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, saved: Tensor, of: Any, take: Take, *wanted: Tensor
    ) -> Tensor:
        ctx.of, ctx.take = of, take
        ctx.set_materialize_grads(False)
        found = linear(x, weight, bias)
        # A model may go on in place, which autograd forbids on a view that a function gives.
        return torch.ops.aten._unsafe_view(found, found.shape) if found._is_view() else found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return tuple(None for _ in ctx.needs_input_grad)
        if torch.is_grad_enabled():
            raise TrainingError(
                "gradients of gradients (create_graph=True) need the gradients of whole weights; "
                "call sculptor.protect(..., full_gradients=True)"
            )
        x, weight = ctx.of.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        rows = dy.reshape(-1, dy.shape[-1])
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        wanted = ctx.needs_input_grad[6:]
        given: Sequence[Tensor | None] = [None for _ in wanted]
        if any(wanted):
            given = ctx.take(OuterProduct(x.reshape(-1, x.shape[-1]), rows))
        return dx, None, bias, None, None, None, *given


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, take: Take, wanted: Sequence[Tensor]) -> Tensor:
    """x W^T + b; in the backward pass `take` gets X and dY, and gives the gradients of `wanted`, of which some are needed.

    Args:
        x: (..., n).
        weight: W (m, n); no gradient reaches it.
        bias: b (m,).

    Raises:
        TrainingError: in the backward pass, if that is to be differentiated itself.
    """
    x = x.to(weight.dtype)  # as autocast would
    found: list[Any] = []
    trigger = next(value for value in wanted if value.requires_grad)
    saved = _Saved.apply(trigger, found, x, weight)  # type: ignore[no-untyped-call]
    made: Tensor = _Linear.apply(x, weight, bias, saved, found[0], take, *wanted)  # type: ignore[no-untyped-call]
    return made


def is_narrowed(rule: Rule, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a rule had better get X and dY than a gradient, in the pass under way; `dtype` is that of the weight."""
    if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
        return False
    kind = x.device.type
    # Autocast to another dtype than the weight's would make another product of it, with another rule's tensors.
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if x.shape[-1] != rule.shape[1] or product != dtype:
        return False
    return reads_before_sum(rule, x.numel() // x.shape[-1], kind)


def reads_before_sum(rule: Rule, tokens: float, kind: str) -> TypeGuard[Narrowing]:
    """Whether free directions had better be read before gradients are summed over so many tokens, on a type of device."""
    m, n = rule.shape
    return isinstance(rule, Narrowing) and m * n > SMALL.get(kind, 0) and rule.order(tokens) != "after"


def can_hand_over(module: nn.Module) -> bool:
    """Whether a module is torch's own linear map, parametrized or not, and nobody has changed how it runs."""
    kinds = [kind for kind in type(module).__mro__ if "forward" in vars(kind)]
    return kinds[0] is nn.Linear and "forward" not in vars(module)


class HandedOver(NamedTuple):
    """A linear map that gives X and dY."""

    module: nn.Module

    def remove(self) -> None:
        """It runs as torch has it again."""
        del self.module.forward


def hand_over(module: nn.Module, rule: Rule, give: Callable[[OuterProduct], None], device: torch.device) -> HandedOver:
    """Has a linear map, whose weight is its parameter, give X and dY where its rule has less to do with that.

    Args:
        module: `can_hand_over` it.
        rule: of the weight.
        give: takes them.
        device: where the module runs.
    """
    trigger = torch.empty(0, device=device, requires_grad=True)  # the backward pass comes by, whatever else is trained

    def take(gradient: OuterProduct) -> tuple[None]:
        give(gradient)
        return (None,)

    module.forward = partial(_run, module, rule, take, trigger)
    return HandedOver(module)


def _run(module: Any, rule: Rule, take: Take, trigger: Tensor, x: Tensor) -> Tensor:
    if not is_narrowed(rule, x, module.weight.dtype):
        return linear(x, module.weight, module.bias)
    return multiply(x, module.weight.detach(), module.bias, take, (trigger,))
