"""AdamW in host memory, by a thread, in the order of the blocks: moments never cross the link."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sculptor.streaming.regions import HostRegion
from sculptor.training.stepping.block import Due, StreamedBlock


class HostOptimizer:
    """Steps blocks one after another, beside the computation.

    Args:
        blocks: whose state and gradients are in host memory.
    """

    def __init__(self, blocks: Mapping[int, StreamedBlock]) -> None:
        self.blocks = blocks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sculptor-adamw")
        self._jobs: dict[int, Future[None]] = {}

    def submit(self, block: int, due: Due) -> None:
        """Steps a block as soon as its gradients are there; its divisors are in host memory."""
        self._jobs[block] = self._thread.submit(self._run, self.blocks[block], due)

    def wait(self, block: int) -> None:
        """Returns when a block has been stepped."""
        if block in self._jobs:
            self._jobs.pop(block).result()

    @torch.no_grad()
    def _run(self, block: StreamedBlock, due: Due) -> None:
        block.gradients.written.finish()
        assert isinstance(block.state, HostRegion)
        assert isinstance(block.gradients, HostRegion)
        for matrix in block.matrices:
            if matrix.name in due.touched:
                views = matrix.state.views(block.state.memory[matrix.state_start :])
                views |= matrix.gradient_views(block.gradients.memory[matrix.gradient_start :])
                matrix.step(views, due.rate_of, due.divisors.of(matrix.name))

    def close(self) -> None:
        """Ends the thread, after what it has been given."""
        self._thread.shutdown()
