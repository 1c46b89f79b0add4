"""What calibration sees of stacked experts: each matrix has the tokens that are sent to it, and no others.

C is a mean over these tokens. G is one over all of the batch's: where a token is not sent to, it has no gradient. So the
curvature tr C tr G of an expert counts as often as it is used, beside matrices that every token passes.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sculptor.checkpoint.architecture import Target
from sculptor.model.experts import Rows, multiply, take_over


class Recorder(Protocol):
    """What keeps the sums."""

    gradients: bool
    is_recording: bool

    def call_counted(self) -> None: ...
    def real_tokens(self, num_tokens: int) -> Tensor | None: ...
    def add_input(self, group: str, rows: Tensor) -> None: ...
    def add_gradient(self, target: Target, rows: Tensor, x: Tensor) -> None: ...
    def count_gradients(self, target: Target, num_tokens: int) -> None: ...


def watch_experts(model: Any, targets: Sequence[Target], recorder: Recorder) -> list["WatchedExperts"]:
    """Has modules of experts run these one by one, and tell the recorder of each."""
    modules: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        if not target.window.is_whole:
            modules[target.module].append(target)
    return [WatchedExperts(model.get_submodule(path), found, recorder) for path, found in modules.items()]


class WatchedExperts:
    """One module of experts, until it is removed."""

    def __init__(self, module: Any, targets: Sequence[Target], recorder: Recorder) -> None:
        self._targets = targets
        self._recorder = recorder
        self._inside: dict[tuple[str, int], list[Target]] = defaultdict(list)
        for target in targets:
            assert target.window.part is not None
            self._inside[target.parameter.rpartition(".")[2], target.window.part].append(target)
        self._handles = [take_over(module, self._product), module.register_forward_hook(self._called)]

    def remove(self) -> None:
        """Leaves the module as it was."""
        for handle in self._handles:
            handle.remove()

    def _called(self, _: Any, args: tuple[Tensor, ...], __: Any) -> None:
        if self._recorder.is_recording:
            for target in self._targets if self._recorder.gradients else ():
                # As many tokens as there are, whether they are sent to it or not.
                self._recorder.count_gradients(target, len(args[0]))
            self._recorder.call_counted()

    def _product(self, module: Any, leaf: str, expert: int, rows: Rows) -> Tensor:
        made = multiply(module, leaf, expert, rows)
        targets = self._inside.get((leaf, expert))
        if not targets:
            return made
        if self._recorder.is_recording:
            self._recorder.add_input(targets[0].input_group, self._real(rows))
        if not (self._recorder.gradients and torch.is_grad_enabled()):
            return made
        if not made.requires_grad:  # the graph begins here
            made = made.detach().requires_grad_(True).clone()
        if self._recorder.is_recording:
            made.register_hook(partial(self._read_gradient, targets, rows.inputs.detach()))  # type: ignore[no-untyped-call]
        return made

    def _real(self, rows: Rows) -> Tensor:
        """Without padding, which is sent to experts too."""
        real = self._recorder.real_tokens(rows.num_tokens)
        return rows.inputs.detach() if real is None else rows.inputs.detach()[real[rows.tokens]]

    def _read_gradient(self, targets: Sequence[Target], x: Tensor, gradient: Tensor) -> None:
        for target in targets:
            self._recorder.add_gradient(target, target.window.outputs(gradient.detach()), x)
