"""Full-size gradients of a streamed block's matrices, handed on one at a time as they appear."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sculptor.training.experts import run_in_pieces, tap
from sculptor.training.stepping.block import StreamedMatrix

Collect = Callable[[StreamedMatrix, Tensor], None]


def listen(model: Any, matrices: Sequence[StreamedMatrix], collect: Collect, device: torch.device) -> list[Any]:
    """Has gradients go to `collect`, and no further; returns what is to be removed in the end.

    Experts run one by one for that: the gradient of their stack, which is as large as the stack, never exists.
    """
    handles: list[Any] = []
    stacked: dict[str, list[StreamedMatrix]] = defaultdict(list)
    for matrix in matrices:
        if matrix.record.window.is_whole:
            register: Any = matrix.parameter.register_post_accumulate_grad_hook
            handles.append(register(partial(_take, collect, matrix)))
        else:
            stacked[matrix.parameter_name.rpartition(".")[0]].append(matrix)
    for path, found in stacked.items():
        taps = [(matrix.record, tap(partial(collect, matrix), device)) for matrix in found]
        handles.append(run_in_pieces(model.get_submodule(path), taps))
    return handles


def _take(collect: Collect, matrix: StreamedMatrix, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    collect(matrix, gradient)
