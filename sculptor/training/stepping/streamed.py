"""Training with one block on the device at a time: gradients become coordinates at once, AdamW and folding follow.

What waits elsewhere, per block: the folded weights, the bases, coordinates with their AdamW moments, coordinate gradients
(float32), and pristine weights. In a backward pass every full-size gradient is projected as soon as it appears, and the block's
coordinate gradients leave when the block is finished. The norm, by which they are clipped, is known when all of them have left;
so a block is updated when it is next fetched for a forward pass, into the very slot it is computed from. Nothing is stale, and
everything is brought up to date before it is saved. With `fused`, a block is updated as soon as it is finished.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.archive.store import Archive
from sculptor.errors import TrainingError
from sculptor.numerics.precision import float32_products
from sculptor.streaming.blocks import BlockStream, Observer
from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Ticket
from sculptor.training.protect import find_parameters
from sculptor.training.rates import Peaks
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.block import Due, Stage, StreamedBlock, StreamedMatrix, check_owners, prepare_block
from sculptor.training.stepping.block_update import BlockUpdater, Divisors, HostOptimizer, by_matrix, made_by, on_cpu
from sculptor.training.stepping.gradients import listen
from sculptor.training.stepping.optimizer import (
    MOMENTS,
    divisor,
    extra_groups,
    load_state,
    make_optimizer,
    optimizer_on_host,
    set_rates,
    with_state,
)
from sculptor.training.stepping.updates import Tensors, Updates, tensors_of

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
        self._extra_optimizer = make_optimizer(groups, self.device) if groups else None
        parameters = find_parameters(model, archive)
        on_host = optimizer_on_host(settings, stream.weights.scratch.tier, self.device)
        where = torch.device("cpu") if on_host else self.device
        self.blocks: dict[int, StreamedBlock] = {}
        self._hooks: list[Any] = []
        self._resident = [p for p in model.parameters() if p.numel() and not any(p is value for value in values)]
        for i, found in enumerate(stream.parameters):
            names = {name: parameters[name] for name in archive.open_names if parameters[name] in found}
            if names:
                self.blocks[i] = prepare_block(i, stream, archive, names, peaks, settings, where)
                self._hooks += listen(model, self.blocks[i].matrices, partial(self._collect, i), self.device)
            tick(1)
        self._owners = {matrix.name: i for i, block in self.blocks.items() for matrix in block.matrices}
        check_owners(archive, self._owners)
        count = 2 if self.device.type == "cuda" else 1
        self._host = HostOptimizer(self.blocks) if on_host else None
        size = max(block.gradient_layout.num_bytes for block in self.blocks.values())
        self._gradients = Slots(count, size, self.device, self._load_gradients)
        self._updater = BlockUpdater(stream, self.blocks, count, self._host)
        self._rate_of: RateOf = lambda peak: peak
        self._host_divisors: Divisors = None
        stream.observer = self
        if not getattr(model.config, "output_router_logits", False):  # a router's loss is over the whole batch
            stream.part_tokens = PART_TOKENS.get(self.device.type)

    # The passing of blocks

    def fill(self, block: int, slot: Slot) -> list[Ticket] | None:
        if (found := self.blocks.get(block)) is None or found.stage not in (Stage.DUE, Stage.REPLACED):
            return None
        layout = self.stream.layouts[block]
        ours, partly = made_by(found, layout)
        rest = [name for name in layout if name not in ours]
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

    def block_begun(self, block: int) -> None:
        if (found := self.blocks.get(block)) is None:
            return
        if self.fused and found.stage is Stage.COLLECTED:
            raise TrainingError(f"{self.stream.paths[block]} is used several times in a forward pass; use exact")
        found.stage = Stage.OPEN
        self._updater.bases.enter(block)
        slot = self._gradients.enter(block)
        for ticket in slot.taken():  # it is written to, so what reads it has to be over
            ticket.wait()

    def _collect(self, block: int, matrix: StreamedMatrix, gradient: Tensor) -> None:
        """A full-size gradient has appeared: only its coordinates are kept."""
        found = self.blocks[block]
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
        if block not in self.blocks:
            return
        found, gradients, bases = self.blocks[block], self._gradients.find(block), self._updater.bases.find(block)
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
        return sum(b.num_coordinates for b in self.blocks.values()) + sum(v.numel() for v in self.extra.values())

    def fingerprints(self) -> dict[str, list[float]]:
        return {m.name: m.fingerprint for block in self.blocks.values() for m in block.matrices}

    def begin(self, rate_of: RateOf) -> None:
        self._rate_of = rate_of

    def end_backward(self) -> None:
        self.stream.end_backward()

    def clip(self) -> float:
        if self._waiting:  # a block that this forward did not come by still waits for the divisors of the last step
            self.flush()
        limit = self.settings.clip
        norms = [norm for block in self.blocks.values() for norm in block.norms.values()]
        own = [value.grad for value in self.extra.values() if value.grad is not None]
        own_norms = list(map(torch.linalg.vector_norm, own))
        total = torch.linalg.vector_norm(torch.stack([*norms, *own_norms])) if norms or own else torch.zeros(())
        divisors: Divisors = None
        limit = 0.0 if self.fused and not own else limit  # its blocks have been updated
        if limit and self.settings.clip_by == "matrix":
            divisors = by_matrix(list(self.blocks.values()), limit)
            for gradient, norm in zip(own, own_norms, strict=True):
                gradient.div_(divisor(norm, limit))
        elif limit:
            divisors = divisor(total, limit)
            for gradient in own:
                gradient.div_(divisors)
        self._updater.clip_with(divisors)
        if self._host is not None:
            self._host_divisors = on_cpu(divisors)
        return float(total)

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
                self.stream.slots.forget(i)

    def forget(self) -> None:
        for value in self.extra.values():
            value.grad = None
        for block in self.blocks.values():
            block.forget()

    @property
    def _waiting(self) -> list[int]:
        """Blocks that are not up to date."""
        return [i for i, block in self.blocks.items() if block.stage in (Stage.DUE, Stage.REPLACED)]

    def flush(self) -> None:
        """Brings every block up to date, also where it waits."""
        for block in self._waiting:
            self.stream.slots.fetch(block)
        self.transfers.drain()

    def _read(self, name: str, suffix: str = "") -> Tensor:
        """Coordinates, or a moment of them, on the CPU."""
        block = self.blocks[self._owners[name.rpartition(".A")[0]]]
        place = block.state_layout[name + suffix]
        memory = torch.empty(place.stop - place.start, dtype=torch.uint8)
        block.state.load(memory, place.start)
        return memory.view(place.dtype).view(place.shape)

    def parameters(self) -> Tensors:
        self.flush()
        extra = tensors_of(self.extra)
        entries = {
            key: (torch.float32, tuple(block.state_layout[key].shape))
            for block in self.blocks.values()
            for matrix in block.matrices
            for key in matrix.keys
        }
        return Tensors(
            {**entries, **extra.entries}, lambda name: self._read(name) if name in entries else extra.read(name)
        )

    def state(self) -> Tensors:
        parameters = self.parameters()
        small = with_state(self.extra, self._extra_optimizer) if self._extra_optimizer is not None else {}
        entries = dict(parameters.entries)
        moments: dict[str, tuple[str, str]] = {}
        for block in self.blocks.values():
            for matrix in block.matrices:
                for key, a in zip(matrix.keys, matrix.coordinates, strict=True):
                    if "step" not in matrix.optimizer.state[a]:
                        continue
                    small[f"{key}.step"] = matrix.optimizer.state[a]["step"]
                    for moment in MOMENTS:
                        moments[f"{key}.{moment}"] = key, f".{moment}"
                        entries[f"{key}.{moment}"] = entries[key]
        others = tensors_of(small)

        def read(name: str) -> Tensor:
            if name in moments:
                return self._read(*moments[name])
            return (others if name in others.entries else parameters).read(name)

        return Tensors({**entries, **others.entries}, read)

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor], *, optimizer: bool) -> None:
        self.flush()
        for name, value in self.extra.items():
            value.copy_(saved[name])
        if optimizer and self._extra_optimizer is not None:
            load_state(self.extra, self._extra_optimizer, saved)
        for i, block in self.blocks.items():
            block.load_state(saved, optimizer)
            block.stage = Stage.REPLACED
            self.stream.slots.forget(i)

    def coordinates(self, name: str) -> list[Tensor] | None:
        if name not in self._owners:
            return None
        self.flush()
        matrix = next(m for m in self.blocks[self._owners[name]].matrices if m.name == name)
        return [self._read(key).to(self.device) for key in matrix.keys]

    def release_model(self) -> None:
        self.flush()
        self.stream.slots.close()
        self._updater.close()
        self._gradients.close()
        for parameter in self._resident:
            parameter.data = parameter.data.new_empty(0)

    def close(self) -> None:
        for handle in self._hooks:  # they hold what holds them, past any collector
            handle.remove()
        self._hooks.clear()
        part: Any
        for part in (self.stream, self._updater, self._gradients, *self.blocks.values()):
            part.close()
        self.blocks.clear()
