"""Bases that every process reads its own gradients in, before they are added up: narrower gradients are less to send.

Their owner alone holds them; it shows those of a block as the backward pass comes to it, as it does weights.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from sculptor.methods.rule import Narrowing, OuterProduct, Rule
from sculptor.numerics.free_space import MANY_TOKENS, Name
from sculptor.numerics.precision import float32_products
from sculptor.streaming.layout import Layout
from sculptor.streaming.owners import Owners
from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Ticket
from sculptor.streaming.waiting import WaitingBlocks
from sculptor.training.coordinates import working_dtype
from sculptor.training.stepping.block import StreamedBlock
from sculptor.training.stepping.gradients import GradientSource


def narrowed_side(rule: Rule) -> Name | None:
    """The side of a gradient that is narrowed before processes add it up, if that is less to do, and to send."""
    order = rule.order(MANY_TOKENS) if isinstance(rule, Narrowing) else "after"
    if not isinstance(rule, Narrowing) or order == "after" or order == "both":
        return None
    return order if sum(narrowed_numbers(rule, order)) <= rule.shape[0] * rule.shape[1] else None


def narrowed_numbers(rule: Narrowing, name: Name) -> tuple[int, int]:
    """Of a narrowed gradient, and of what is shown for that."""
    shape, shown = rule.narrowing(name)
    return torch.Size(shape).numel(), sum(torch.Size(each).numel() for each in shown.values())


class ShownBases:
    """Those of one block after another.

    Args:
        waiting: the blocks of the model.
        own: of these what this process holds.
        owners: of the parameters.
        sources: of each block that is trained, where gradients come from, by matrix, whoever owns it.
        count: of blocks at a time; 2 to show what comes next.

    Attributes:
        sides: of the matrices whose gradients are narrowed, which side.
        slots: for the bases of blocks, on the device. Filling one is for all processes to do, in one order.
    """

    def __init__(
        self,
        waiting: WaitingBlocks,
        own: Mapping[int, StreamedBlock],
        owners: Owners,
        sources: Mapping[int, Mapping[str, GradientSource]],
        count: int,
    ) -> None:
        self.transfers = waiting.transfers
        self.device = waiting.device
        self._own = own
        self._rules: dict[str, Narrowing] = {}
        self.sides: dict[str, Name] = {}
        self._layouts: dict[int, Layout] = {}
        held_by: list[dict[str, int]] = [{} for _ in waiting.layouts]
        for block, of in sources.items():
            entries = []
            for name, source in of.items():
                side = narrowed_side(source.rule) if source.linear is not None else None
                if side is None:
                    continue
                assert isinstance(source.rule, Narrowing)
                self.sides[name], self._rules[name] = side, source.rule
                dtype = working_dtype(waiting.layouts[block][source.parameter_name].dtype, self.device)
                owner = owners.blocks[block][source.parameter_name]
                for key, shape in source.rule.narrowing(side)[1].items():
                    entries.append((owner, _entry(name, key), dtype, shape))
            entries.sort(key=lambda entry: entry[:2])
            self._layouts[block] = Layout(entry[1:] for entry in entries)
            held_by[block] = {key: owner for owner, key, *_ in entries}
        self._owners = Owners(owners.world, held_by)
        size = max((layout.num_bytes for layout in self._layouts.values()), default=0)
        self.slots = Slots(count, size, self.device, self._fill)

    def shape(self, name: str, full: tuple[int, ...]) -> tuple[int, ...]:
        """Of a matrix's gradients, which are `full` where they are not narrowed."""
        side = self.sides.get(name)
        return full if side is None else self._rules[name].narrowing(side)[0]

    @torch.no_grad()
    def narrow(self, block: int, name: str, gradient: Tensor | OuterProduct) -> Tensor:
        """A gradient of a matrix whose side is narrowed, in the block that was entered last."""
        slot = self.slots.find(block)
        assert slot is not None
        side, rule, layout = self.sides[name], self._rules[name], self._layouts[block]
        tensors = {key: layout.view(slot.memory, _entry(name, key)) for key in rule.narrowing(side)[1]}
        with float32_products(self.device, tf32=True):
            return rule.narrow(tensors, gradient, side).values

    def _fill(self, block: int, slot: Slot) -> list[Ticket]:
        layout, found = self._layouts[block], self._own.get(block)
        after = slot.taken()
        if not layout:
            return after
        if found is not None:
            job = partial(self._load, found, layout, slot.memory)
            after = [self.transfers.load(job, [*after, found.bases.written])]
        return [self.transfers.load(partial(self._owners.show, block, layout, slot.memory), after)]

    def _load(self, block: StreamedBlock, layout: Layout, memory: Tensor) -> None:
        """What this process holds, from where it waits."""
        for matrix in block.matrices:
            for key, held in matrix.bases.items():
                if (entry := _entry(matrix.name, key)) in layout:
                    span = layout[entry]
                    block.bases.load(memory[span.start : span.stop], block.bases_layout[held].start)

    def close(self) -> None:
        """Gives the memory back."""
        self.slots.close()


def _entry(name: str, key: str) -> str:
    return f"{name}/{key}"
