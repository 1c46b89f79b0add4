"""Experts run one after the other, each of their matrices by itself.

Transformers runs all experts of a block at once, on stacked weights whose gradient comes as one tensor. Where every matrix
counts by itself (what its tokens read, the gradient of one at a time), a module's `forward` is overridden on the instance by
this one. It does what transformers' own implementations do, from what `use_experts_implementation` leaves on the module.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sculptor.checkpoint.orientation import as_out_in


class Rows(NamedTuple):
    """What an expert's matrix reads: inputs (t, n), which of the batch's tokens they are of (t,), and how many these are."""

    inputs: Tensor
    tokens: Tensor
    num_tokens: int


# Gives what a matrix makes of its rows, (t, m), without a bias: module, parameter in it, expert, rows.
Multiply = Callable[[Any, str, int, Rows], Tensor]


def multiply(module: Any, leaf: str, expert: int, rows: Rows) -> Tensor:
    """The product with an expert's whole matrix, as the module holds it."""
    return product(rows, getattr(module, leaf)[expert], module.is_transposed)


def product(rows: Rows, weight: Tensor, transposed: bool) -> Tensor:
    """Inputs times a stored weight, in its dtype."""
    return nn.functional.linear(rows.inputs.to(weight.dtype), as_out_in(weight, transposed))


class TakenOver(NamedTuple):
    """A module of experts that runs here."""

    module: nn.Module

    def remove(self) -> None:
        """It runs as transformers has it again."""
        del self.module.forward


def take_over(module: nn.Module, by: Multiply) -> TakenOver:
    """Has a module of experts run here, with products by `by`."""
    module.forward = partial(run_experts, module, by)
    return TakenOver(module)


def run_experts(module: Any, by: Multiply, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every token through the experts chosen for it, and their weighted sum.

    Args:
        module: holds the experts.
        by: makes the products.
        hidden: (tokens, n).
        chosen: experts of each token, (tokens, k).
        weights: of these, (tokens, k).
    """
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    tokens = order // chosen.shape[-1]
    counts = torch.bincount(ids, minlength=module.num_experts).tolist()
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            own = tokens[start : start + count]
            found.append(_run(module, by, expert, Rows(hidden[own], own, len(hidden))))
        start += count
    outputs = torch.cat(found)
    if getattr(module, "has_post_expert_norm", False):
        outputs = module.post_expert_norm(outputs)
    weighted = outputs * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)


def _run(module: Any, by: Multiply, expert: int, rows: Rows) -> Tensor:
    first = _with_bias(module, "gate_up_proj" if module.has_gate else "up_proj", expert, by, rows)
    inner = module._apply_gate(first) if module.has_gate else module.act_fn(first)
    return _with_bias(module, "down_proj", expert, by, rows._replace(inputs=inner))


def _with_bias(module: Any, leaf: str, expert: int, by: Multiply, rows: Rows) -> Tensor:
    made = by(module, leaf, expert, rows)
    return made + getattr(module, f"{leaf}_bias")[expert] if module.has_bias else made
