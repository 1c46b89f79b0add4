"""Experts that a model holds stacked in one parameter, each of them a matrix of its own.

Which modules hold experts is told by what transformers' `use_experts_implementation` leaves on them: whatever runs them
relies on the same. In the files there may be one tensor for all of them, or one for each, gate and up apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sculptor.checkpoint.names import Origins
from sculptor.checkpoint.reader import Slice
from sculptor.checkpoint.windows import Window

# Parameters that hold a matrix for each expert.
LEAVES = ("gate_up_proj", "up_proj", "down_proj")
_MARKS = ("is_transposed", "has_bias", "has_gate", "num_experts", "_apply_gate", "config")
# How configurations call the number of experts that a token is sent to.
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")


@dataclass(frozen=True, slots=True)
class StackedParameter:
    """A parameter with the matrices of several experts.

    Attributes:
        name: of the parameter.
        block: path of its block.
        count: of the experts.
        shape: (m, n) = (out, in) of each.
        transposed: stored as (in, out).
        share: of the tokens, how many an expert gets on average.
    """

    name: str
    block: str
    count: int
    shape: tuple[int, int]
    transposed: bool
    share: float


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts, in a way that is known."""
    return all(hasattr(module, name) for name in _MARKS) and any(
        value is not None and value.ndim == 3 for value in (module._parameters.get(leaf) for leaf in LEAVES)
    )


def find_stacked(blocks: Mapping[str, nn.Module]) -> dict[str, StackedParameter]:
    """Parameter -> what it holds, in the order of the model."""
    found = [
        _describe(f"{block}.{path}.{leaf}", block, child, child._parameters[leaf])
        for block, module in blocks.items()
        for path, child in module.named_modules()
        if path and is_experts(child)
        for leaf in LEAVES
        if child._parameters.get(leaf) is not None
    ]
    return {stacked.name: stacked for stacked in found}


def _describe(name: str, block: str, module: Any, value: Any) -> StackedParameter:
    count, rows, columns = value.shape
    shape = (columns, rows) if module.is_transposed else (rows, columns)
    chosen = next((getattr(module.config, name) for name in _CHOSEN if hasattr(module.config, name)), count)
    share = min(1.0, chosen / count) if isinstance(chosen, int) else 1.0
    return StackedParameter(name, block, count, shape, bool(module.is_transposed), share)


def find_routers(skeleton: nn.Module, stacked: Mapping[str, StackedParameter]) -> set[str]:
    """Parameters of modules beside experts that have a row for each of them."""
    found = set()
    for parameter, experts in stacked.items():
        path = parameter.rpartition(".")[0]
        parent, _, own = path.rpartition(".")
        for name, child in skeleton.get_submodule(parent).named_children():
            values = child._parameters.items() if name != own else ()
            found |= {
                f"{parent}.{name}.{leaf}"
                for leaf, value in values
                if value is not None and value.ndim == 2 and value.shape[0] == experts.count
            }
    return found


def find_windows(stacked: StackedParameter, origins: Origins) -> dict[Slice, Window]:
    """Matrix in the files -> where it is in a parameter; empty where loading does more than to stack them."""
    if (tensor := origins.tensors.get(stacked.name)) is not None:
        return {Slice(tensor, part): Window(part) for part in range(stacked.count)}
    if stacked.transposed or stacked.name not in origins.converted:
        return {}
    found = origins.converted[stacked.name].windows(origins.shapes)
    return {Slice(name): window for name, window in (found or {}).items()}


def expert_role(parameter: str, tensor: str, window: Window) -> str:
    """What an expert's matrix is called, whichever expert it is of: as the parameter, or where that joins two, as its tensor."""
    if window.rows is None:
        return parameter
    return f"{parameter.rpartition('.')[0]}.{tensor.removesuffix('.weight').rpartition('.')[2]}"
