"""The blocks of a model whose parameters wait elsewhere, whoever runs them, and however."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sculptor.streaming.layout import Layout
from sculptor.streaming.regions import BlockWeights
from sculptor.streaming.transfers import Transfers


@dataclass(frozen=True, eq=False, slots=True)
class WaitingBlocks:
    """What is held of the blocks of a model.

    Attributes:
        model: the model; parameters of the blocks that are streamed hold nothing.
        modules: path -> block, in the order of the model.
        parameters: of each block, by name.
        weights: where these wait.
        transfers: the lanes.
        num_slots: blocks on the device at a time; 2 to load ahead.
        keep_inputs: whether activation checkpoints, the inputs of the blocks, stay on the device.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    parameters: Sequence[Mapping[str, nn.Parameter]]
    weights: BlockWeights
    transfers: Transfers
    num_slots: int
    keep_inputs: bool

    @property
    def paths(self) -> list[str]:
        """Of the blocks."""
        return list(self.modules)

    @property
    def device(self) -> torch.device:
        """Where the blocks run."""
        return self.transfers.device

    @property
    def layouts(self) -> Sequence[Layout]:
        """Of the parameters of each block."""
        return self.weights.layouts

    def close(self) -> None:
        """Gives back where they wait."""
        self.transfers.close()
        self.weights.close()
