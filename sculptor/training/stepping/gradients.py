"""Full-size gradients of a streamed block's matrices, handed on one at a time as they appear."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sculptor.checkpoint.windows import Window
from sculptor.training.experts import run_in_pieces, tap


class GradientSource(NamedTuple):
    """Where the gradient of a matrix comes from: a parameter of the model, or a window of one."""

    window: Window
    parameter: nn.Parameter
    parameter_name: str


# Takes the name of a matrix and its gradient.
Collect = Callable[[str, Tensor], None]


def listen(model: Any, sources: Mapping[str, GradientSource], collect: Collect, device: torch.device) -> list[Any]:
    """Has gradients go to `collect`, and no further; returns what is to be removed in the end.

    Experts run one by one for that: the gradient of their stack, which is as large as the stack, never exists.
    """
    handles: list[Any] = []
    stacked: dict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        source.parameter.requires_grad_(source.window.is_whole)
        if source.window.is_whole:
            register: Any = source.parameter.register_post_accumulate_grad_hook
            handles.append(register(partial(_take, collect, name)))
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
