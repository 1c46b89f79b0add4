"""Full-size gradients of a streamed block's matrices, handed on one at a time as they appear."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sculptor.archive.manifest import MatrixRecord
from sculptor.checkpoint.windows import Window
from sculptor.methods.rule import OuterProduct, Rule
from sculptor.training.experts import run_in_pieces, tap
from sculptor.training.linear import can_hand_over, hand_over


class GradientSource(NamedTuple):
    """Where the gradient of a matrix comes from.

    Attributes:
        window: the matrix in its parameter, `parameter_name`.
        rule: that it is for.
        linear: the module that can give X and dY in its place; None where it is something else.
    """

    window: Window
    parameter: nn.Parameter
    parameter_name: str
    rule: Rule
    linear: nn.Module | None


def source_of(model: nn.Module, record: MatrixRecord, parameter: nn.Parameter, name: str) -> GradientSource:
    """For a matrix of an archive, and the parameter of the model that it is, or is a part of."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    can = leaf == "weight" and record.window.is_whole and can_hand_over(module)
    return GradientSource(record.window, parameter, name, record.rule, module if can else None)


# Takes the name of a matrix and its gradient, of all rows of the pass or of some.
Collect = Callable[[str, Tensor | OuterProduct], None]


def listen(model: Any, sources: Mapping[str, GradientSource], collect: Collect, device: torch.device) -> list[Any]:
    """Has gradients go to `collect`, and no further; returns what is to be removed in the end.

    Linear maps give what their gradient is the sum of, where a rule has less to do with that. Experts run one by one: the gradient
    of their stack, which is as large as the stack, never exists.
    """
    handles: list[Any] = []
    stacked: dict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        source.parameter.requires_grad_(source.window.is_whole)
        if source.window.is_whole:
            register: Any = source.parameter.register_post_accumulate_grad_hook
            handles.append(register(partial(_take, collect, name)))
            if source.linear is not None:
                handles.append(hand_over(source.linear, source.rule, partial(collect, name), device))
        else:
            stacked[source.parameter_name].append(name)
    modules: dict[str, list[tuple[str, Window, Callable[[Tensor], Tensor]]]] = defaultdict(list)
    for parameter, names in stacked.items():
        path, _, leaf = parameter.rpartition(".")
        modules[path] += [(leaf, sources[name].window, tap(partial(collect, name), device)) for name in names]
    return handles + [run_in_pieces(model.get_submodule(path), asked) for path, asked in modules.items()]


def _take(collect: Collect, name: str, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    collect(name, gradient)
