"""Where several processes divide a model: gradients are added up at the owners of their matrices, and projected there.

Where a rule leaves few directions of a side free, a gradient is narrowed to them first (`narrowing.py`). It waits in a slot
until its block is finished; then all processes add up what they have, on the lane that loads, and each projects what it owns
on the updating one, while the block before is computed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sculptor.methods.rule import Narrowed, OuterProduct, dense
from sculptor.streaming.layout import Layout
from sculptor.streaming.owners import Owners
from sculptor.streaming.slots import Slot
from sculptor.streaming.transfers import Ticket
from sculptor.streaming.waiting import WaitingBlocks
from sculptor.training.stepping.gradients import GradientSource
from sculptor.training.stepping.narrowing import ShownBases
from sculptor.training.stepping.optimizer import add_up_gradients
from sculptor.training.stepping.projected_at_once import ProjectedAtOnce


class AddedUpAtOwners:
    """The gradients of one block after another: collected, and added up once the block is finished.

    Args:
        own: projects those of the matrices that are held here.
        waiting: the blocks of the model.
        owners: of its parameters.
        sources: of each block that is trained, where gradients come from, by matrix, whoever owns it.
        count: of blocks at a time; 2 to add up while the next one is computed.
    """

    def __init__(
        self,
        own: ProjectedAtOnce,
        waiting: WaitingBlocks,
        owners: Owners,
        sources: Mapping[int, Mapping[str, GradientSource]],
        count: int,
    ) -> None:
        self.own = own
        self.owners = owners
        self.sources = sources
        self.transfers = waiting.transfers
        self.device = waiting.device
        self.bases = ShownBases(waiting, own.blocks, owners, sources, count)
        self.layouts = {block: self._layout(waiting.layouts[block], of) for block, of in sources.items()}
        size = max(layout.num_bytes for layout in self.layouts.values())
        self._slots = [Slot(size, waiting.device) for _ in range(count)]
        self._there: set[str] = set()
        self._reached: set[str] = set()  # by a gradient, in this step and process

    def _layout(self, parameters: Layout, sources: Mapping[str, GradientSource]) -> Layout:
        """Of the gradients of a block, in the order of its parameters, which is that of their owners."""
        shapes = {
            source.parameter_name: self.bases.shape(name, parameters[source.parameter_name].shape)
            for name, source in sources.items()
        }
        return Layout((name, at.dtype, shapes[name]) for name, at in parameters.items() if name in shapes)

    def block_begun(self, block: int) -> None:
        """Makes room for the gradients of a block."""
        if block in self.sources:
            self.bases.slots.enter(block)
            self._take_slot(block)
        with self.transfers.lane("update"):
            self.own.block_begun(block)

    def _take_slot(self, block: int) -> None:
        self._slots.reverse()
        slot = self._slots[0]
        for ticket in slot.taken():
            ticket.wait()
        slot.holds = block
        self._there.clear()

    def collect(self, block: int, name: str, gradient: Tensor | OuterProduct) -> None:
        """Takes a gradient, of all rows of the pass or of some."""
        view = self._view(block, name)
        gradient = self.bases.narrow(block, name, gradient) if name in self.bases.sides else dense(gradient)
        if name in self._there:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        self._there.add(name)

    def _view(self, block: int, name: str) -> Tensor:
        """The gradient of a matrix of the block that was begun last."""
        assert self._slots[0].holds == block
        source = self.sources[block][name]
        return source.window.of(self.layouts[block].view(self._slots[0].memory, source.parameter_name))

    def block_done(self, block: int, slot: Slot) -> None:
        """Adds them up at their owners."""
        if block not in self.sources:
            return
        bases = self.bases.slots.find(block)
        assert bases is not None
        bases.uses["compute"] = self.transfers.mark()
        added = self._add_up(block)
        if (found := self.own.blocks.get(block)) is None:
            return
        with self.transfers.lane("update"):
            added.wait()
            for matrix in found.matrices:
                added_up, side = self._view(block, matrix.name), self.bases.sides.get(matrix.name)
                self.own.collect(block, matrix.name, added_up if side is None else Narrowed(added_up, side))
            self._slots[0].uses["update"] = self.transfers.mark()
            self.own.block_done(block, slot)

    def _add_up(self, block: int) -> Ticket:
        """Starts to add up what all processes have; what one has no gradient for counts as 0."""
        layout, slot = self.layouts[block], self._slots[0]
        for name in self.sources[block].keys() - self._there:
            self._view(block, name).zero_()
        self._reached |= self._there
        dtype = next(iter(layout.values())).dtype

        def job() -> None:
            for owner, start, stop in self.owners.parts(block, layout):
                self.owners.world.add_up_at(owner, slot.memory[start:stop].view(dtype))

        slot.uses["load"] = self.transfers.load(job, [self.transfers.mark()])
        return slot.uses["load"]

    def complete(self, extra: Sequence[nn.Parameter]) -> list[Tensor]:
        """The norm of the gradients of all coordinates, whoever owns them; those of `extra` are added up, too."""
        world = self.owners.world
        add_up_gradients(extra, world)
        reached = self._reached_anywhere()
        for block in self.own.blocks.values():
            for matrix in block.matrices:
                matrix.touched = matrix.name in reached
        norms = self.own.complete(extra)
        square = torch.stack(norms).square().sum(0, keepdim=True) if norms else torch.zeros(1, device=self.device)
        world.add_up([square])
        return [square[0].sqrt()]

    def _reached_anywhere(self) -> set[str]:
        """The matrices that a gradient has reached in some process since this was asked last; for all of them to call."""
        names = [name for of in self.sources.values() for name in of]
        counts = self.owners.world.total(*(name in self._reached for name in names))
        self._reached.clear()
        return {name for name, count in zip(names, counts, strict=True) if count}

    def close(self) -> None:
        """Gives the memory back."""
        self._slots.clear()
        self.bases.close()
        self.own.close()
