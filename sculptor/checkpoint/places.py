"""Where each tensor of a checkpoint is in its model: role, depth, orientation, and which names are of one parameter."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sculptor.checkpoint.architecture import build_skeleton, find_blocks, general_path, role_of
from sculptor.checkpoint.names import find_converted, match_names
from sculptor.checkpoint.reader import Checkpoint


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is.

    Attributes:
        parameter: that it is loaded into; of several tied ones the first.
        role: path inside its block, preceded by the stack where there are several; outside of blocks, its own path.
        depth: of its block in its stack, 0 for the first to 1 for the last; None outside of the blocks.
        transposed: a matrix stored as (in, out).
        tied: other parameters of the model that are this one.
        whole: whether it is the parameter; else loading makes the parameter of several tensors, or several of it.
    """

    parameter: str
    role: str
    depth: float | None
    transposed: bool = False
    tied: tuple[str, ...] = ()
    whole: bool = True


def find_places(checkpoint: Checkpoint) -> dict[str, Place]:
    """Tensor -> where it is; what no parameter or buffer of the model is made of is left out.

    Raises:
        CheckpointError: if the model cannot be built.
    """
    skeleton = build_skeleton(checkpoint)
    owners = {tensor: parameter for parameter, tensor in match_names(skeleton, checkpoint).items()}
    made = {
        tensor: parameter
        for parameter, conversion in find_converted(skeleton, checkpoint).items()
        for tensor, _ in conversion.sources
    }
    same = _tied(skeleton)
    depths = _depths(skeleton)
    several = len({block.rpartition(".")[0] for block in depths}) > 1
    found = {}
    for tensor, parameter in (made | owners).items():
        block = next((path for path in depths if parameter.startswith(path + ".")), None)
        path = parameter.removesuffix(".weight")
        first = same.get(parameter, parameter)
        found[tensor] = Place(
            parameter=first,
            role=general_path(path) if block is None else role_of(path, block, several),
            depth=None if block is None else depths[block],
            transposed=_is_transposed(skeleton, parameter),
            tied=tuple(name for name, other in same.items() if other == first != name),
            whole=tensor in owners,
        )
    return found


def _tied(skeleton: nn.Module) -> dict[str, str]:
    """Parameter -> the first name of it."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(value), name) for name, value in skeleton.named_parameters(remove_duplicate=False)
    }


def _depths(skeleton: nn.Module) -> Mapping[str, float]:
    """Block -> l / (L - 1), l its position among the L blocks of its stack; 0 where it is the only one."""
    blocks = list(find_blocks(skeleton))
    sizes = Counter(block.rpartition(".")[0] for block in blocks)
    seen: Counter[str] = Counter()
    found = {}
    for block in blocks:
        stack = block.rpartition(".")[0]
        found[block] = seen[stack] / max(1, sizes[stack] - 1)
        seen[stack] += 1
    return found


def _is_transposed(skeleton: Any, parameter: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    path, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and isinstance(skeleton.get_submodule(path), Conv1D)
