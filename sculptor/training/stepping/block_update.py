"""AdamW and folding for one block at a time: everything passes through a ring of device memory, matrix by matrix."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from sculptor.numerics.precision import float32_products
from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.regions import HostRegion
from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Ticket
from sculptor.training.stepping.block import Due, StreamedBlock
from sculptor.training.stepping.optimizer import divisor

# What gradients are divided by: each matrix's by its own, all by one, or none.
Divisors = Mapping[str, Tensor] | Tensor | None


class BlockUpdater:
    """Updates blocks, into the slots that their parameters are read from.

    Args:
        stream: of the model.
        blocks: those that are trained.
        host: does the stepping, or None to step on the device.
        count: of slots for bases and of pieces of the ring; 2 to load ahead.

    Attributes:
        bases: of blocks, on the device.
    """

    def __init__(
        self, stream: BlockStream, blocks: Mapping[int, StreamedBlock], count: int, host: "HostOptimizer | None"
    ) -> None:
        self.stream = stream
        self.transfers = stream.transfers
        self.device = stream.device
        self.blocks = blocks
        self.host = host
        self.bases = Slots(
            count, max((b.bases_layout.num_bytes for b in blocks.values()), default=0), self.device, self._load_bases
        )
        sizes = (matrix.num_bytes(host is None) for block in blocks.values() for matrix in block.matrices)
        size = max(sizes, default=0)
        self._ring = [Slot(size, self.device) for _ in range(count)]
        self._divisors: Divisors = None
        self._divisors_ready = self.transfers.mark()

    def clip_with(self, divisors: Divisors) -> None:
        """What gradients are divided by from now on: each matrix's by its own, all by one, or none."""
        self._divisors = divisors
        self._divisors_ready = self.transfers.mark()

    @torch.no_grad()
    def update(
        self,
        block: int,
        slot: Slot,
        due: Due | None,
        gradients: Slot | None = None,
        divisors: Divisors = None,
    ) -> Ticket:
        """AdamW and a new folded weight for every matrix of a block, on the current lane.

        Args:
            block: which.
            slot: device memory for its parameters.
            due: what is due, or None to fold only.
            gradients: holds their gradients, or None to bring these from where they wait.
            divisors: what these are divided by, if not by what `clip_with` said.
        """
        found = self.blocks[block]
        if self.host is not None:
            self.host.wait(block)
            due = None
        stepping = due is not None
        touched = due.touched if due is not None else frozenset()
        bases = self.bases.enter(block)
        self._divisors_ready.wait()
        ahead, last = len(self._ring) > 1, _last_of(found)
        loads = [self._bring(found, 0, stepping, gradients is None)]
        for k, matrix in enumerate(found.matrices):
            if ahead and k + 1 < len(found.matrices):
                loads.append(self._bring(found, k + 1, stepping, gradients is None))
            loads[k].wait()
            ring = self._ring[k % len(self._ring)]
            views = matrix.views(ring.memory, stepping)
            if due is not None and matrix.name in touched:
                if gradients is not None:
                    views |= matrix.gradient_views(gradients.memory[matrix.gradient_start :])
                matrix.step(views, due.rate_of, chosen(divisors or self._divisors, matrix.name))
            target = matrix.record.window.of(self.stream.layouts[block].view(slot.memory, matrix.parameter_name))
            with float32_products(self.device, tf32=True):
                target.copy_(matrix.fold(found.tensors(matrix, bases.memory), views, target.dtype))
            done = self.transfers.mark()
            ring.uses = {"update": done}
            if matrix.name in touched:
                stored = self.transfers.store(partial(matrix.store_state, found, ring.memory), [done])
                found.state.written = stored
                ring.uses["store"] = stored
            if k == last[matrix.parameter_name]:
                region = self.stream.weights.region(block)
                store = partial(self.stream.weights.store, block, slot.memory, matrix.parameter_name)
                region.written = self.transfers.store(store, [done])
                slot.uses["store"] = region.written
            if not ahead and k + 1 < len(found.matrices):
                loads.append(self._bring(found, k + 1, stepping, gradients is None))
        done = self.transfers.mark()
        bases.uses["update"] = done
        return done

    def _bring(self, block: StreamedBlock, k: int, stepping: bool, with_gradients: bool) -> Ticket:
        """State, gradients and pristine weight of a matrix into the ring."""
        ring, matrix = self._ring[k % len(self._ring)], block.matrices[k]
        after = [*ring.taken(), block.state.written, block.gradients.written]
        job = partial(matrix.load, block, self.stream.weights.files, ring.memory, stepping, with_gradients)
        return self.transfers.load(job, after)

    def _load_bases(self, block: int, slot: Slot) -> list[Ticket]:
        found = self.blocks[block]
        memory = slot.memory[: found.bases_layout.num_bytes]
        return [self.transfers.load(lambda: found.bases.load(memory, 0), slot.taken())]

    def close(self) -> None:
        """Gives the memory back."""
        if self.host is not None:
            self.host.close()
        self.bases.close()
        self._ring.clear()


class HostOptimizer:
    """AdamW in host memory, by a thread, in the order of the blocks: moments never cross the link.

    Args:
        blocks: whose state and gradients are in host memory.
    """

    def __init__(self, blocks: Mapping[int, StreamedBlock]) -> None:
        self.blocks = blocks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sculptor-adamw")
        self._jobs: dict[int, Future[None]] = {}

    def submit(self, block: int, due: Due, divisors: Divisors) -> None:
        """Steps a block as soon as its gradients are there."""
        self._jobs[block] = self._thread.submit(self._run, self.blocks[block], due, divisors)

    def wait(self, block: int) -> None:
        """Returns when a block has been stepped."""
        if block in self._jobs:
            self._jobs.pop(block).result()

    @torch.no_grad()
    def _run(self, block: StreamedBlock, due: Due, divisors: Divisors) -> None:
        block.gradients.written.finish()
        assert isinstance(block.state, HostRegion)
        assert isinstance(block.gradients, HostRegion)
        for matrix in block.matrices:
            if matrix.name in due.touched:
                views = matrix.state.views(block.state.memory[matrix.state_start :])
                views |= matrix.gradient_views(block.gradients.memory[matrix.gradient_start :])
                matrix.step(views, due.rate_of, chosen(divisors, matrix.name))

    def close(self) -> None:
        """Ends the thread, after what it has been given."""
        self._thread.shutdown()


def chosen(divisors: Divisors, name: str) -> Tensor | None:
    """What the gradients of a matrix are divided by."""
    return divisors if divisors is None or isinstance(divisors, Tensor) else divisors[name]


def by_matrix(blocks: Sequence[StreamedBlock], limit: float) -> dict[str, Tensor]:
    """What the gradients of each matrix are divided by, when matrices are clipped one by one."""
    return {
        matrix.name: divisor(torch.linalg.vector_norm(torch.stack([block.norms[key] for key in matrix.keys])), limit)
        for block in blocks
        for matrix in block.matrices
        if matrix.touched
    }


def clip_own(
    blocks: Sequence[StreamedBlock],
    own: Sequence[Tensor],
    norms: Sequence[Tensor],
    total: Tensor,
    limit: float,
    apart: bool,
) -> Tensor | dict[str, Tensor]:
    """Divides gradients that are on the device, and says what those of blocks are to be divided by.

    Args:
        blocks: whose gradients wait.
        own: gradients of openly trained parameters, with these `norms`.
        total: norm of all.
        limit: the largest norm.
        apart: whether each matrix and parameter is clipped by itself.
    """
    whole = divisor(total, limit)
    for gradient, norm in zip(own, norms, strict=True):
        gradient.div_(divisor(norm, limit) if apart else whole)
    return by_matrix(blocks, limit) if apart else whole


def on_cpu(divisors: Divisors) -> Divisors:
    """The same in host memory; waits for the device."""
    if divisors is None or isinstance(divisors, Tensor):
        return divisors if divisors is None else divisors.cpu()
    return {name: value.cpu() for name, value in divisors.items()}


def _last_of(block: StreamedBlock) -> dict[str, int]:
    """The last matrix of each parameter, by position."""
    return {matrix.parameter_name: k for k, matrix in enumerate(block.matrices)}
