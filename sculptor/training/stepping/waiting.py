"""Coordinates and moments of blocks, by name, where they wait: read for a saved state, and put back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sculptor.training.stepping.block import StreamedBlock
from sculptor.training.stepping.optimizer import AdamW, load_state, with_state
from sculptor.training.stepping.updates import LazyTensors, tensors_of


class WaitingState:
    """What is trained of a streamed model, and its optimizer's state.

    Args:
        blocks: those that are trained, with the matrices that are held here.
        extra: openly trained parameters, `optimizer` of them, if there are some.
    """

    def __init__(
        self,
        blocks: Mapping[int, StreamedBlock],
        extra: Mapping[str, nn.Parameter],
        optimizer: AdamW | None,
    ) -> None:
        self.blocks = blocks
        self.extra = extra
        self.optimizer = optimizer
        self._holders = {matrix.name: block for block in blocks.values() for matrix in block.matrices}

    def read(self, name: str, suffix: str = "") -> Tensor:
        """Coordinates, or a moment of them, on the CPU."""
        block = self._holders[name.rpartition(".A")[0]]
        span = block.state_layout[name + suffix]
        memory = torch.empty(span.stop - span.start, dtype=torch.uint8)
        block.state.load(memory, span.start)
        return memory.view(span.dtype).view(span.shape)

    def parameters(self) -> LazyTensors:
        """All of them."""
        extra = tensors_of(self.extra)
        entries = {
            key: (torch.float32, tuple(block.state_layout[key].shape))
            for block in self.blocks.values()
            for matrix in block.matrices
            for key in matrix.keys
        }
        return LazyTensors(
            {**entries, **extra.entries}, lambda name: self.read(name) if name in entries else extra.read(name)
        )

    def state(self) -> LazyTensors:
        """The same with what the optimizer keeps of each."""
        parameters = self.parameters()
        small = with_state(self.extra, self.optimizer) if self.optimizer is not None else {}
        entries = dict(parameters.entries)
        moments: dict[str, tuple[str, str]] = {}  # where one is: coordinate, suffix
        for block in self.blocks.values():
            for matrix in block.matrices:
                for key, a in zip(matrix.keys, matrix.coordinates, strict=True):
                    if "step" not in matrix.optimizer.state[a]:
                        continue
                    small[f"{key}.step"] = matrix.optimizer.state[a]["step"]
                    for moment in matrix.moments:
                        moments[f"{key}.{moment}"] = key, f".{moment}"
                        span = block.state_layout[f"{key}.{moment}"]
                        entries[f"{key}.{moment}"] = span.dtype, tuple(span.shape)
        others = tensors_of(small)

        def read(name: str) -> Tensor:
            if name in moments:
                return self.read(*moments[name])
            return (others if name in others.entries else parameters).read(name)

        return LazyTensors({**entries, **others.entries}, read)

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor], *, optimizer: bool) -> None:
        """Puts back what `parameters`, or with `optimizer` what `state` gave, as far as it is held here."""
        for name, value in self.extra.items():
            value.copy_(saved[name])
        if optimizer and self.optimizer is not None:
            load_state(self.extra, self.optimizer, saved)
        for block in self.blocks.values():
            block.load_state(saved, optimizer)
