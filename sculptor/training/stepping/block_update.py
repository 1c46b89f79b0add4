"""AdamW and folding for one block at a time: everything passes through a ring of device memory, matrix by matrix."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from sculptor.numerics.precision import float32_products
from sculptor.streaming.slots import Slot, Slots, loading
from sculptor.streaming.transfers import Ticket
from sculptor.streaming.waiting import WaitingBlocks
from sculptor.training.coordinates import folded_weight
from sculptor.training.stepping.block import FOLD_ONLY, Due, Stage, StreamedBlock, StreamedMatrix
from sculptor.training.stepping.host_optimizer import HostOptimizer


class BlockUpdater:
    """Brings blocks up to date as they are fetched, in the slots that their parameters are read from.

    Args:
        waiting: the blocks of the model.
        blocks: those that are trained.
        host: does the stepping, or None to step on the device.
        count: of slots for bases and of pieces of the ring; 2 to load ahead.

    Attributes:
        bases: of blocks, on the device.
        stale: blocks that are not up to date, for some process.
    """

    def __init__(
        self, waiting: WaitingBlocks, blocks: Mapping[int, StreamedBlock], count: int, host: HostOptimizer | None
    ) -> None:
        self.waiting = waiting
        self.transfers = waiting.transfers
        self.device = waiting.device
        self.blocks = blocks
        self.host = host
        self.stale: set[int] = set()
        size = max((b.bases_layout.num_bytes for b in blocks.values()), default=0)
        self.bases = Slots(count, size, self.device, loading(self.transfers, lambda block: blocks[block].bases))
        sizes = (matrix.num_bytes(host is None) for block in blocks.values() for matrix in block.matrices)
        size = max(sizes, default=0)
        self._ring = [Slot(size, self.device) for _ in range(count)]

    def refill(self, block: int, slot: Slot) -> list[Ticket] | None:
        """What the stream asks for when it fetches a block: an update into the slot, if one is due."""
        self.stale.discard(block)
        if (found := self.blocks.get(block)) is None or found.stage not in (Stage.DUE, Stage.REPLACED):
            return None
        uses = [*slot.taken(), *([self.waiting.weights.written(block)] if found.shares else [])]
        loaded = self.transfers.load(partial(self.waiting.weights.load, block, slot.memory, found.others), uses)
        with self.transfers.lane("update"):
            for ticket in [*uses, *([loaded] if found.shares else [])]:
                ticket.wait()
            updated = self.update(block, slot, found.due if found.stage is Stage.DUE else FOLD_ONLY, {})
        found.stage = Stage.CURRENT
        return [loaded, updated]

    @torch.no_grad()
    def update(self, block: int, slot: Slot, due: Due, gradients: Mapping[str, Tensor]) -> Ticket:
        """AdamW for the matrices of a block that gradients have reached, and a new folded weight for all, on the current lane.

        Args:
            block: which.
            slot: device memory for its parameters.
            due: the update; where the host steps it only folding is left.
            gradients: by the name of their coordinates and `.grad`, where they are on the device; others are brought.
        """
        found = self.blocks[block]
        if self.host is not None:
            self.host.wait(block)
            due = FOLD_ONLY
        bases, stepping = self.bases.enter(block), bool(due.touched)
        due.divisors.ready.wait()
        for matrix, ring in self._brought(found, stepping, not gradients):
            views = matrix.views(ring.memory, stepping)
            stepped = matrix.name in due.touched
            if stepped:
                views |= {name: gradients[name] for name in views.keys() & gradients.keys()}
                matrix.step(views, due.rate_of, due.divisors.of(matrix.name))
            parameter = self.waiting.layouts[block].view(slot.memory, matrix.parameter_name)
            self._fold(matrix, found.tensors(matrix, bases.memory), views, matrix.record.window.of(parameter))
            self._store(block, matrix, slot, ring, stepped)
        bases.uses["update"] = done = self.transfers.mark()
        return done

    def _brought(
        self, block: StreamedBlock, stepping: bool, with_gradients: bool
    ) -> Iterator[tuple[StreamedMatrix, Slot]]:
        """Each matrix with a piece of the ring that holds what its update needs; with two pieces, the next is on its way."""
        loads: list[Ticket] = []
        for k, matrix in enumerate(block.matrices):
            for after in block.matrices[len(loads) : k + len(self._ring)]:
                loads.append(self._bring(block, after, self._piece(len(loads)), stepping, with_gradients))
            loads[k].wait()
            yield matrix, self._piece(k)

    def _piece(self, k: int) -> Slot:
        return self._ring[k % len(self._ring)]

    def _bring(
        self, block: StreamedBlock, matrix: StreamedMatrix, ring: Slot, stepping: bool, with_gradients: bool
    ) -> Ticket:
        """State, gradients and pristine weight of a matrix into the ring."""
        after = [*ring.taken(), block.state.written, block.gradients.written]
        job = partial(matrix.load, block, self.waiting.weights.files, ring.memory, stepping, with_gradients)
        return self.transfers.load(job, after)

    def _fold(
        self, matrix: StreamedMatrix, tensors: Mapping[str, Tensor], views: Mapping[str, Tensor], into: Tensor
    ) -> None:
        """The weight that the model computes with."""
        record, coordinates = matrix.record, [views[key] for key in matrix.keys]
        with float32_products(self.device, tf32=True):
            into.copy_(
                folded_weight(record.rule, tensors, coordinates, views["pristine"], record.transposed, into.dtype)
            )

    def _store(self, block: int, matrix: StreamedMatrix, slot: Slot, ring: Slot, stepped: bool) -> None:
        """Keeps what an update has changed: A and its moments, and the parameter after the last of its matrices."""
        done = self.transfers.mark()
        ring.uses = {"update": done}
        if stepped:
            state, memory = self.blocks[block].state, ring.memory[: matrix.state.num_bytes]
            ring.uses["store"] = state.written = self.transfers.store(
                partial(state.store, memory, matrix.state_start), [done]
            )
        if matrix.is_last:
            weights = self.waiting.weights
            region = weights.region(
                block
            )  # before the lane's own thread asks: two would each make one, of the same file
            store = partial(weights.store, block, slot.memory, matrix.parameter_name)
            slot.uses["store"] = region.written = self.transfers.store(store, [done])

    def close(self) -> None:
        """Gives the memory back."""
        if self.host is not None:
            self.host.close()
        self.bases.close()
        self._ring.clear()
