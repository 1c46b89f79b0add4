"""Training with one block on the device at a time: what the loop asks for, of what waits elsewhere.

What waits, per block: the folded weights, the bases, coordinates with their AdamW moments, coordinate gradients (float32),
and pristine weights. The stream brings blocks and calls three others on the way, by its `Hooks`, each in a file of its own:

`projected_at_once.py` has the gradients of a backward pass, of one process; `added_up_at_owners.py` where several divide the
model. `block_update.py` updates a block when it is next fetched for a forward pass, into the very slot it is computed from,
or before it is saved: the norm, by which gradients are clipped, is known only when all of them have left. With `fused` a block
is updated as soon as its gradients are complete.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.archive.store import Archive
from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.hooks import Hooks
from sculptor.streaming.slots import Slots
from sculptor.streaming.waiting import WaitingBlocks
from sculptor.training.protect import find_parameters
from sculptor.training.rates import Peaks
from sculptor.training.schedule import RateOf
from sculptor.training.settings import TrainSettings
from sculptor.training.stepping.added_up_at_owners import AddedUpAtOwners
from sculptor.training.stepping.block import Divisors, Stage
from sculptor.training.stepping.block_update import BlockUpdater
from sculptor.training.stepping.clipping import clip
from sculptor.training.stepping.gradients import listen
from sculptor.training.stepping.host_optimizer import HostOptimizer
from sculptor.training.stepping.optimizer import extra_groups, make_optimizer, optimizer_on_host, set_rates
from sculptor.training.stepping.prepare import PreparedBlocks, prepare_blocks
from sculptor.training.stepping.projected_at_once import ProjectedAtOnce
from sculptor.training.stepping.updates import LazyTensors, Updates
from sculptor.training.stepping.waiting import WaitingState
from sculptor.world import ALONE

# Tokens that a block sees at a time: more gain nothing, and their activations fill a device.
PART_TOKENS = {"cuda": 8192}


class StreamedUpdates(Updates):
    """Trains the matrices of an archive in a streamed model.

    Args:
        model: the model.
        stream: of its blocks, as it is read; a stream that trains takes its place, `self.stream`.
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
        waiting = stream.waiting
        self.device = waiting.device
        self.settings = settings
        self.extra = dict(extra)
        self._fused = settings.optimizer_mode == "fused"
        groups = extra_groups(self.extra, peaks.extra)
        openly = list(self.extra.values())
        num_trained = archive.num_free + sum(value.numel() for value in openly)
        self._extra_optimizer = make_optimizer(groups, self.device, settings, num_trained) if groups else None
        self._resident = [p for p in model.parameters() if p.numel() and not any(p is value for value in openly)]
        on_host = optimizer_on_host(settings, waiting.weights.scratch.tier, self.device)
        where = torch.device("cpu") if on_host else self.device
        parameters = find_parameters(model, archive)
        found = prepare_blocks(waiting, archive, parameters, peaks, settings, where, num_trained, tick)
        self.blocks, self._sources, self.owners = dict(found.blocks), found.sources, found.owners
        self._num_coordinates = found.num_coordinates
        self._keys = {matrix.name: matrix.keys for block in self.blocks.values() for matrix in block.matrices}
        self._fingerprints = _gather_fingerprints(waiting, found)
        self._state = WaitingState(self.blocks, self.extra, self._extra_optimizer)
        count, host = stream.slots.count, HostOptimizer(self.blocks) if on_host else None
        self._updater = BlockUpdater(waiting, self.blocks, count, host)
        self._at_once = ProjectedAtOnce(waiting, self._updater, settings, count)
        divided = waiting.weights.owners
        self._gradients = (
            AddedUpAtOwners(self._at_once, waiting, divided, found.sources, count) if divided else self._at_once
        )
        self._divisors = Divisors()  # of the step under way, from `clip` to `step`
        self._listening: list[Any] = []
        for i, sources in self._sources.items():
            self._listening += listen(model, sources, partial(self._gradients.collect, i), self.device)
        self.stream = stream.with_hooks(self._hooks(model))

    def _hooks(self, model: Any) -> Hooks:
        """What the passes of the model do beside running blocks."""
        asked = (
            getattr(each, "output_router_logits", False) for each in (model.config, model.config.get_text_config())
        )
        routed = any(asked)  # a router's loss is over the whole batch
        return Hooks(
            refill=self._updater.refill,
            block_begun=self._gradients.block_begun,
            block_done=self._gradients.block_done,
            beside={i: self._beside(i) for i in self._sources},
            part_tokens=None if routed else PART_TOKENS.get(self.device.type),
        )

    def _beside(self, block: int) -> tuple[Slots, ...]:
        """What its backward pass takes; what processes show each other comes in one order, whatever each of them holds."""
        shown = (self._gradients.bases.slots,) if isinstance(self._gradients, AddedUpAtOwners) else ()
        return (*shown, self._updater.bases, self._at_once.slots) if block in self.blocks else shown

    @property
    def num_trainable(self) -> int:
        return self._num_coordinates + sum(v.numel() for v in self.extra.values())

    def fingerprints(self) -> dict[str, list[float]]:
        return self._fingerprints

    # A step

    def begin(self, rate_of: RateOf) -> None:
        self._at_once.rate_of = rate_of

    def pass_by(self) -> None:
        self.stream.pass_by(training=True)

    def clip(self) -> float:
        coordinates = self._gradients.complete(list(self.extra.values()))
        own = [value.grad for value in self.extra.values() if value.grad is not None]
        norms = list(map(torch.linalg.vector_norm, own))
        every = [*coordinates, *norms]
        total = torch.linalg.vector_norm(torch.stack(every)) if every else torch.zeros(())
        limit = 0.0 if self._fused and not own else self.settings.clip  # its blocks have been updated
        apart = self.settings.clip_by == "matrix"
        divisors = clip(list(self.blocks.values()), own, norms, total, limit, apart)
        on_host = self._updater.host is not None
        self._divisors = divisors.on_cpu() if on_host else replace(divisors, ready=self.stream.transfers.mark())
        return float(total)

    def step(self, rate_of: RateOf) -> None:
        if self._extra_optimizer is not None:
            set_rates(self._extra_optimizer, rate_of)
            self._extra_optimizer.step()
            self._extra_optimizer.zero_grad(set_to_none=True)
        for i, block in self.blocks.items():
            if block.take_step(rate_of, self._divisors, updated=self._fused):
                if self._updater.host is not None:
                    self._updater.host.submit(i, block.due)
                self._updater.stale.add(i)
        if self.stream.divided:  # some process may have one that is due
            self._updater.stale.update(self._sources)
        for i in self._updater.stale:
            self.stream.slots.forget(i)

    def forget(self) -> None:
        """Forgets the gradients of a step that is not taken."""
        for value in self.extra.values():
            value.grad = None
        for block in self.blocks.values():
            block.forget()

    # What is read, and put back

    def flush(self) -> None:
        """Brings every block up to date, also where it waits."""
        for block in sorted(self._updater.stale):
            self.stream.slots.fetch(block)
        self.stream.transfers.drain()

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
        self._updater.stale.update(self._sources)
        for i in self._sources:
            self.stream.slots.forget(i)

    def coordinates(self, name: str) -> list[Tensor] | None:
        if (keys := self._keys.get(name)) is None:
            return None
        self.flush()
        return [self._state.read(key).to(self.device) for key in keys]

    # The end

    def release_model(self) -> None:
        self.flush()
        part: Any
        for part in (self.stream.slots, self._updater, self._gradients):
            part.close()
        for parameter in self._resident:
            parameter.data = parameter.data.new_empty(0)

    def close(self) -> None:
        for handle in self._listening:  # they hold what holds them, past any collector
            handle.remove()
        self._listening.clear()
        part: Any
        for part in (self.stream, self._updater, self._gradients, *self.blocks.values()):
            part.close()
        self.blocks.clear()


def _gather_fingerprints(waiting: WaitingBlocks, found: PreparedBlocks) -> dict[str, list[float]]:
    """Of the bases of every matrix, whoever owns it."""
    world = waiting.weights.owners.world if waiting.weights.owners else ALONE
    own = {matrix.name: matrix.fingerprint for block in found.blocks.values() for matrix in block.matrices}
    return {name: mark for marks in world.gather(own) for name, mark in marks.items()}
