"""Full-size gradients on their way to the owners of their matrices, where several processes divide a model."""

from collections.abc import Mapping

from torch import Tensor

from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.layout import Layout
from sculptor.streaming.owners import Owners
from sculptor.streaming.slots import Slot
from sculptor.streaming.transfers import Ticket
from sculptor.training.stepping.gradients import GradientSource


class FullGradients:
    """The gradients of one block after another: collected, and added up at the owners once the block is finished.

    Args:
        stream: of the model.
        owners: of its parameters.
        trained: of each block that is trained, where gradients come from, by matrix, whoever owns it.
        count: of blocks at a time; 2 to add up while the next one is computed.
    """

    def __init__(
        self, stream: BlockStream, owners: Owners, trained: Mapping[int, Mapping[str, GradientSource]], count: int
    ) -> None:
        self.owners = owners
        self.trained = trained
        self.transfers = stream.transfers
        self.layouts = {
            block: Layout((name, at.dtype, at.shape) for name, at in stream.layouts[block].items() if name in names)
            for block, sources in trained.items()
            for names in [{source.parameter_name for source in sources.values()}]
        }
        size = max(layout.num_bytes for layout in self.layouts.values())
        self._slots = [Slot(size, stream.device) for _ in range(count)]
        self._there: set[str] = set()
        self._reached: set[str] = set()

    def begin(self, block: int) -> None:
        """The gradients of a block are about to appear."""
        self._slots.reverse()
        slot = self._slots[0]
        for ticket in slot.taken():
            ticket.wait()
        slot.holds = block
        self._there.clear()

    def add(self, block: int, name: str, gradient: Tensor) -> None:
        """Takes a gradient, of all rows of the pass or of some."""
        view = self.view(block, name)
        if name in self._there:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        self._there.add(name)

    def view(self, block: int, name: str) -> Tensor:
        """The gradient of a matrix of the block that was begun last."""
        assert self._slots[0].holds == block
        source = self.trained[block][name]
        return source.window.of(self.layouts[block].view(self._slots[0].memory, source.parameter_name))

    def add_up(self, block: int) -> Ticket:
        """Starts to add up what all processes have; what one has no gradient for counts as 0."""
        layout, slot = self.layouts[block], self._slots[0]
        for name in self.trained[block].keys() - self._there:
            self.view(block, name).zero_()
        self._reached |= self._there
        dtype = next(iter(layout.values())).dtype

        def job() -> None:
            for owner, start, stop in self.owners.parts(block, layout):
                self.owners.world.add_up_at(owner, slot.memory[start:stop].view(dtype))

        slot.uses["load"] = self.transfers.load(job, [self.transfers.mark()])
        return slot.uses["load"]

    def used(self) -> None:
        """The current stream has been given what reads the gradients that were added up last."""
        self._slots[0].uses["update"] = self.transfers.mark()

    def reached(self) -> set[str]:
        """The matrices that a gradient has reached in some process since this was asked last; for all of them to call."""
        names = [name for sources in self.trained.values() for name in sources]
        counts = self.owners.world.total(*(name in self._reached for name in names))
        self._reached.clear()
        return {name for name, count in zip(names, counts, strict=True) if count}

    def close(self) -> None:
        """Gives the memory back."""
        self._slots.clear()
