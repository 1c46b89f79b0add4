"""Training with one block on the device at a time: gradients become coordinates at once, AdamW and folding follow.

What waits elsewhere, per block: the folded weights, the bases, coordinates with their AdamW moments, coordinate gradients
(float32), and pristine weights. In a backward pass every full-size gradient is projected as soon as it appears, and the block's
coordinate gradients leave when the block is finished. The norm, by which they are clipped, is known when all of them have left;
so a block is updated when it is next fetched for a forward pass, into the very slot it is computed from, or before it is saved;
with `fused`, as soon as it is finished.

Where several processes divide the model, full-size gradients are added up at a matrix's owner when its block is finished
(`full_gradients.py`), and projected on the updating lane, while the one before it is computed.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.archive.store import Archive
from sculptor.errors import TrainingError
from sculptor.numerics.precision import float32_products
from sculptor.streaming.blocks import BlockStream, Observer
from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import DONE, Ticket
from sculptor.training.protect import find_parameters
from sculptor.training.rates import Peaks
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.block import Due, Stage, StreamedBlock, StreamedMatrix
from sculptor.training.stepping.block_update import BlockUpdater, Divisors, HostOptimizer, by_matrix, clip_own, on_cpu
from sculptor.training.stepping.full_gradients import FullGradients
from sculptor.training.stepping.gradients import listen
from sculptor.training.stepping.optimizer import (
    add_up_gradients,
    extra_groups,
    make_optimizer,
    optimizer_on_host,
    set_rates,
)
from sculptor.training.stepping.prepare import prepare_blocks
from sculptor.training.stepping.updates import LazyTensors, Updates
from sculptor.training.stepping.waiting import WaitingState
from sculptor.world import ALONE

# Tokens that a block sees at a time: more gain nothing, and their activations fill a device.
PART_TOKENS = {"cuda": 8192}


class StreamedUpdates(Updates, Observer):
    """Trains the matrices of an archive in a streamed model.

    Args:
        model: the model.
        stream: of its blocks.
        archive: of its checkpoint.
        extra: openly trained parameters, which are on the device.
        peaks: learning rates.
        settings: resolved settings.
        tick: called after each block that has been prepared.

    Raises:
        CapacityError: if no matrix has a free pair.
        MemoryError: if the host does not give enough memory.
    """

    def __init__(
        self,
        model: Any,
        stream: BlockStream,
        archive: Archive,
        extra: Mapping[str, nn.Parameter],
        peaks: Peaks,
        settings: TrainSettings,
        tick: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.stream = stream
        self.transfers = stream.transfers
        self.device = stream.device
        self.settings = settings
        self.fused = settings.optimizer_mode == "fused"
        self.extra = dict(extra)
        values = list(self.extra.values())
        groups = extra_groups(self.extra, peaks.extra)
        num_trained = archive.num_free + sum(value.numel() for value in values)
        self._extra_optimizer = make_optimizer(groups, self.device, settings, num_trained) if groups else None
        owners = stream.weights.owners
        self.world = ALONE if owners is None else owners.world
        on_host = optimizer_on_host(settings, stream.weights.scratch.tier, self.device)
        where = torch.device("cpu") if on_host else self.device
        self._resident = [p for p in model.parameters() if p.numel() and not any(p is value for value in values)]
        places = find_parameters(model, archive)
        found = prepare_blocks(stream, archive, places, peaks, settings, where, num_trained, tick)
        self.blocks, self._trained, self.owners = dict(found.blocks), found.trained, found.owners
        self._num_coordinates = found.num_coordinates
        self._matrices = {matrix.name: matrix for block in self.blocks.values() for matrix in block.matrices}
        self._hooks: list[Any] = []
        for i, sources in self._trained.items():
            self._hooks += listen(model, sources, partial(self._collect, i), self.device)
        count = stream.slots.count
        self._full = FullGradients(stream, owners, self._trained, count) if owners else None
        self._host = HostOptimizer(self.blocks) if on_host else None
        size = max((block.gradient_layout.num_bytes for block in self.blocks.values()), default=0)
        self._gradients = Slots(count, size, self.device, self._load_gradients)
        self._updater = BlockUpdater(stream, self.blocks, count, self._host)
        self._state = WaitingState(self.blocks, self.extra, self._extra_optimizer)
        self._stale: set[int] = set()  # blocks that are not up to date, for some process
        self._collected = DONE  # what `clip` has to wait for
        own = {name: matrix.fingerprint for name, matrix in self._matrices.items()}
        self._fingerprints = {name: mark for marks in self.world.gather(own) for name, mark in marks.items()}
        self._rate_of: RateOf = lambda peak: peak
        self._host_divisors: Divisors = None
        stream.observer = self
        if not getattr(model.config, "output_router_logits", False):  # a router's loss is over the whole batch
            stream.part_tokens = PART_TOKENS.get(self.device.type)

    # The passing of blocks

    def fill(self, block: int, slot: Slot) -> list[Ticket] | None:
        self._stale.discard(block)
        if (found := self.blocks.get(block)) is None or found.stage not in (Stage.DUE, Stage.REPLACED):
            return None
        ours, partly = found.makes(self.stream.layouts[block])
        rest = [name for name in self.stream.weights.names(block) if name not in ours]
        uses = [*slot.taken(), *([self.stream.weights.written(block)] if partly else [])]
        loaded = self.transfers.load(lambda: self.stream.weights.load(block, slot.memory, rest), uses)
        with self.transfers.lane("update"):
            for ticket in [*uses, *([loaded] if partly else [])]:
                ticket.wait()
            updated = self._updater.update(block, slot, found.due)
        found.stage, found.due = Stage.CURRENT, None
        return [loaded, updated]

    def block_expected(self, block: int) -> None:
        if block in self.blocks:
            self._updater.bases.fetch_ahead(block)
            if self.blocks[block].stage is Stage.COLLECTED:
                self._gradients.fetch_ahead(block)

    def _lane(self) -> AbstractContextManager[Any]:
        """Where gradients are projected: at once, or when they have been added up."""
        return nullcontext() if self._full is None else self.transfers.lane("update")

    def block_begun(self, block: int) -> None:
        if self._full is not None and block in self._trained:
            self._full.begin(block)
        if (found := self.blocks.get(block)) is None:
            return
        if self.fused and found.stage is Stage.COLLECTED:
            raise TrainingError(f"{self.stream.paths[block]} is used several times in a forward pass; use exact")
        found.stage = Stage.OPEN
        with self._lane():
            self._updater.bases.enter(block)
            slot = self._gradients.enter(block)
            for ticket in slot.taken():  # it is written to, so what reads it has to be over
                ticket.wait()

    def _collect(self, block: int, name: str, gradient: Tensor) -> None:
        """A full-size gradient has appeared: only its coordinates are kept, here or by its owner."""
        if self._full is not None:
            self._full.add(block, name, gradient)
        else:
            self._project(self.blocks[block], block, self._matrices[name], gradient)

    def _project(self, found: StreamedBlock, block: int, matrix: StreamedMatrix, gradient: Tensor) -> None:
        if found.stage is not Stage.OPEN:
            raise RuntimeError(f"{matrix.name}: its gradient appeared after its block was finished")
        bases, slot = self._updater.bases.find(block), self._gradients.find(block)
        assert bases is not None
        assert slot is not None
        views = self._bring(found, matrix) if matrix.record.rule.reads_weight else {}
        with torch.no_grad(), float32_products(self.device, tf32=True):
            parts = matrix.project(found.tensors(matrix, bases.memory), views, gradient)
            for key, part in zip(matrix.keys, parts, strict=True):
                view = found.gradient_layout.view(slot.memory, key)
                if matrix.touched:
                    view.add_(part)
                else:
                    view.copy_(part)
        matrix.touched = True

    def _bring(self, block: StreamedBlock, matrix: StreamedMatrix) -> Mapping[str, Tensor]:
        """A and W0 of a matrix in device memory of their own."""
        memory = torch.empty(matrix.num_bytes(stepping=False), dtype=torch.uint8, device=self.device)
        job = partial(matrix.load, block, self.stream.weights.files, memory, False, False)
        self.transfers.load(job, [self.transfers.mark(), block.state.written]).wait()
        return matrix.views(memory, stepping=False)

    def block_done(self, block: int, slot: Slot) -> None:
        added = None if self._full is None or block not in self._trained else self._full.add_up(block)
        if (found := self.blocks.get(block)) is None:
            return
        with self._lane():
            if self._full is not None and added is not None:
                added.wait()
                for matrix in found.matrices:
                    self._project(found, block, matrix, self._full.view(block, matrix.name))
                self._full.used()
            self._keep(found, block, slot)
            self._collected = self.transfers.mark()

    def _keep(self, found: StreamedBlock, block: int, slot: Slot) -> None:
        """The gradients of a block's coordinates are complete, for this micro-batch."""
        gradients, bases = self._gradients.find(block), self._updater.bases.find(block)
        found.stage = Stage.COLLECTED
        assert gradients is not None
        assert bases is not None
        # Of every micro-batch, since a later one may skip the block.
        keys = [key for matrix in found.matrices if matrix.touched for key in matrix.keys]
        found.norms = {key: torch.linalg.vector_norm(found.gradient_layout.view(gradients.memory, key)) for key in keys}
        done = self.transfers.mark()
        bases.uses["compute"] = done
        if not self.fused:
            memory = gradients.memory[: found.gradient_layout.num_bytes]
            found.gradients.written = self.transfers.store(lambda: found.gradients.store(memory, 0), [done])
            gradients.uses["store"] = found.gradients.written
            return
        found.divisors = by_matrix([found], self.settings.clip) if self.settings.clip else {}
        done = self.transfers.mark()
        with self.transfers.lane("update"):
            done.wait()
            due = Due(self._rate_of, found.touched())
            updated = self._updater.update(block, slot, due, gradients, found.divisors or None)
        slot.ready = [updated]
        gradients.uses["update"] = updated

    def _load_gradients(self, block: int, slot: Slot) -> list[Ticket]:
        found, uses = self.blocks[block], slot.taken()
        if not found.has_gradients:
            return uses
        memory = slot.memory[: found.gradient_layout.num_bytes]
        return [self.transfers.load(lambda: found.gradients.load(memory, 0), [*uses, found.gradients.written])]

    # What the loop asks for

    @property
    def num_trainable(self) -> int:
        return self._num_coordinates + sum(v.numel() for v in self.extra.values())

    def fingerprints(self) -> dict[str, list[float]]:
        return self._fingerprints

    def begin(self, rate_of: RateOf) -> None:
        self._rate_of = rate_of

    def end_backward(self) -> None:
        self.stream.end_pass(training=True)

    def clip(self) -> float:
        if self._stale:  # a block that this forward did not come by still waits for the divisors of the last step
            self.flush()
        if self._full is not None:
            add_up_gradients(list(self.extra.values()), self.world)
            reached = self._full.reached()
            for matrix in self._matrices.values():
                matrix.touched = matrix.name in reached
        self._collected.wait()
        norms = [norm for block in self.blocks.values() for norm in block.norms.values()]
        own = [value.grad for value in self.extra.values() if value.grad is not None]
        own_norms = list(map(torch.linalg.vector_norm, own))
        total = self._norm(norms, own_norms)
        limit = 0.0 if self.fused and not own else self.settings.clip  # its blocks have been updated
        apart = self.settings.clip_by == "matrix"
        divisors = clip_own(list(self.blocks.values()), own, own_norms, total, limit, apart) if limit else None
        self._updater.clip_with(divisors)
        if self._host is not None:
            self._host_divisors = on_cpu(divisors)
        return float(total)

    def _norm(self, norms: list[Tensor], own: list[Tensor]) -> Tensor:
        """Of everything: over the owners of matrices, and of what all of them have."""
        if self._full is not None:
            square = torch.stack(norms).square().sum(0, keepdim=True) if norms else torch.zeros(1, device=self.device)
            self.world.add_up([square])
            norms = [square[0].sqrt()]
        return torch.linalg.vector_norm(torch.stack([*norms, *own])) if norms or own else torch.zeros(())

    def step(self, rate_of: RateOf) -> None:
        if self._extra_optimizer is not None:
            set_rates(self._extra_optimizer, rate_of)
            self._extra_optimizer.step()
            self._extra_optimizer.zero_grad(set_to_none=True)
        for i, block in self.blocks.items():
            if block.take_step(rate_of, updated=self.fused):
                assert block.due is not None
                if self._host is not None:
                    self._host.submit(i, block.due, self._host_divisors)
                self._stale.add(i)
        if self._full is not None:  # some process may have one that is due
            self._stale.update(self._trained)
        for i in self._stale:
            self.stream.slots.forget(i)

    def forget(self) -> None:
        """Forgets the gradients of a step that is not taken."""
        for value in self.extra.values():
            value.grad = None
        for block in self.blocks.values():
            block.forget()

    def flush(self) -> None:
        """Brings every block up to date, also where it waits."""
        for block in sorted(self._stale):
            self.stream.slots.fetch(block)
        self.transfers.drain()

    def parameters(self) -> LazyTensors:
        self.flush()
        return self._state.parameters()

    def state(self) -> LazyTensors:
        self.flush()
        return self._state.state()

    def load(self, saved: Mapping[str, Tensor], *, optimizer: bool) -> None:
        self.flush()
        self._state.load(saved, optimizer=optimizer)
        for block in self.blocks.values():
            block.stage = Stage.REPLACED
        self._stale.update(self._trained)
        for i in self._trained:
            self.stream.slots.forget(i)

    def coordinates(self, name: str) -> list[Tensor] | None:
        if (matrix := self._matrices.get(name)) is None:
            return None
        self.flush()
        return [self._state.read(key).to(self.device) for key in matrix.keys]

    def release_model(self) -> None:
        self.flush()
        part: Any
        for part in filter(None, (self.stream.slots, self._updater, self._gradients, self._full)):
            part.close()
        for parameter in self._resident:
            parameter.data = parameter.data.new_empty(0)

    def close(self) -> None:
        for handle in self._hooks:  # they hold what holds them, past any collector
            handle.remove()
        self._hooks.clear()
        part: Any
        for part in filter(None, (self.stream, self._updater, self._gradients, self._full, *self.blocks.values())):
            part.close()
        self.blocks.clear()
