"""Where a process steps alone: a full-size gradient becomes the gradients of coordinates as soon as it appears."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sculptor.checkpoint.orientation import as_out_in
from sculptor.errors import TrainingError
from sculptor.methods.rule import Gradient
from sculptor.numerics.precision import float32_products
from sculptor.streaming.regions import Region
from sculptor.streaming.slots import Slot, Slots, loading
from sculptor.streaming.transfers import DONE, Ticket
from sculptor.streaming.waiting import WaitingBlocks
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.block import Divisors, Due, Stage, StreamedBlock, StreamedMatrix
from sculptor.training.stepping.block_update import BlockUpdater
from sculptor.training.stepping.clipping import by_matrix


class ProjectedAtOnce:
    """The gradients of the coordinates of one block after another, on the current lane.

    They leave when the block is finished; with `fused`, the block is updated then.

    Args:
        waiting: the blocks of the model.
        updater: of its blocks.
        settings: resolved settings.
        count: of blocks whose gradients are on the device at a time; 2 to load ahead.

    Attributes:
        slots: gradients of blocks, on the device.
        rate_of: the rates of the step, for a fused update.
    """

    def __init__(self, waiting: WaitingBlocks, updater: BlockUpdater, settings: TrainSettings, count: int) -> None:
        self.waiting = waiting
        self.transfers = waiting.transfers
        self.device = waiting.device
        self.updater = updater
        self.settings = settings
        self.blocks = updater.blocks
        self.rate_of: RateOf = lambda peak: peak
        self._fused = settings.optimizer_mode == "fused"
        self._matrices = {matrix.name: matrix for block in self.blocks.values() for matrix in block.matrices}
        size = max((block.gradient_layout.num_bytes for block in self.blocks.values()), default=0)
        self.slots = Slots(count, size, self.device, loading(self.transfers, self._earlier))
        self._collected = DONE  # what has to be over before norms are read

    def _earlier(self, block: int) -> Region | None:
        """Where gradients of earlier micro-batches wait."""
        found = self.blocks[block]
        return found.gradients if found.has_gradients else None

    def block_begun(self, block: int) -> None:
        """Makes room for the gradients of a block's coordinates."""
        if (found := self.blocks.get(block)) is None:
            return
        if self._fused and found.stage is Stage.COLLECTED:
            raise TrainingError(f"{self.waiting.paths[block]} is used several times in a forward pass; use exact")
        found.stage = Stage.OPEN
        self.updater.bases.enter(block)
        slot = self.slots.enter(block)
        for ticket in slot.taken():  # it is written to, so what reads it has to be over
            ticket.wait()

    def collect(self, block: int, name: str, gradient: Gradient) -> None:
        """A gradient has appeared: only its coordinates are kept."""
        found, matrix = self.blocks[block], self._matrices[name]
        if found.stage is not Stage.OPEN:
            raise RuntimeError(f"{name}: its gradient appeared after its block was finished")
        slot = self.slots.find(block)
        assert slot is not None
        for key, part in zip(matrix.keys, self._project(block, matrix, gradient), strict=True):
            view = found.gradient_layout.view(slot.memory, key)
            if matrix.touched:
                view.add_(part)
            else:
                view.copy_(part)
        matrix.touched = True

    @torch.no_grad()
    def _project(self, block: int, matrix: StreamedMatrix, gradient: Gradient) -> Sequence[Tensor]:
        found, bases = self.blocks[block], self.updater.bases.find(block)
        assert bases is not None
        rule, transposed = matrix.record.rule, matrix.record.transposed
        views = self._bring(found, matrix) if rule.reads_weight else {}
        weight = as_out_in(views["pristine"], transposed) if views else torch.empty(0, device=self.device)
        coordinates = [views[key] for key in matrix.keys] if views else []
        with float32_products(self.device, tf32=True):
            if isinstance(gradient, Tensor):
                gradient = as_out_in(gradient, transposed)
            return rule.project(weight, found.tensors(matrix, bases.memory), coordinates, gradient)

    def _bring(self, block: StreamedBlock, matrix: StreamedMatrix) -> Mapping[str, Tensor]:
        """A and W0 of a matrix in device memory of their own."""
        memory = torch.empty(matrix.num_bytes(stepping=False), dtype=torch.uint8, device=self.device)
        job = partial(matrix.load, block, self.waiting.weights.files, memory, False, False)
        self.transfers.load(job, [self.transfers.mark(), block.state.written]).wait()
        return matrix.views(memory, stepping=False)

    def block_done(self, block: int, slot: Slot) -> None:
        """Has them leave, or with `fused` updates the block in its slot."""
        if (found := self.blocks.get(block)) is None:
            return
        gradients, bases = self.slots.find(block), self.updater.bases.find(block)
        assert gradients is not None
        assert bases is not None
        found.stage = Stage.COLLECTED
        # Of every micro-batch, since a later one may skip the block.
        keys = [key for matrix in found.matrices if matrix.touched for key in matrix.keys]
        found.norms = {key: torch.linalg.vector_norm(found.gradient_layout.view(gradients.memory, key)) for key in keys}
        bases.uses["compute"] = done = self.transfers.mark()
        if self._fused:
            self._update(block, slot, gradients)
        else:
            self._store(found, gradients, done)
        self._collected = self.transfers.mark()

    def _store(self, block: StreamedBlock, gradients: Slot, done: Ticket) -> None:
        memory = gradients.memory[: block.gradients.num_bytes]
        block.gradients.written = self.transfers.store(partial(block.gradients.store, memory, 0), [done])
        gradients.uses["store"] = block.gradients.written

    def _update(self, block: int, slot: Slot, gradients: Slot) -> None:
        """The update of a block within the backward pass, into the slot that its parameters were read from."""
        found = self.blocks[block]
        by_name = by_matrix([found], self.settings.clip) if self.settings.clip else {}
        found.due = Due(self.rate_of, found.touched(), Divisors(by_matrix=by_name, ready=self.transfers.mark()))
        with self.transfers.lane("update"):
            updated = self.updater.update(block, slot, found.due, found.gradient_views(gradients.memory))
        slot.ready = [updated]
        gradients.uses["update"] = updated

    def complete(self, extra: Sequence[nn.Parameter]) -> list[Tensor]:
        """Norms of the gradients of all coordinates, which are complete; `extra` has its own."""
        self._collected.wait()
        return [norm for block in self.blocks.values() for norm in block.norms.values()]

    def close(self) -> None:
        """Gives the memory back."""
        self.slots.close()
