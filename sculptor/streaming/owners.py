"""Who of several processes holds which parameter of a block, and how the others get to see it.

Every parameter has one owner, which alone holds it between passes; for a pass each owner shows the others its part of the block.
Parts lie one after another in a layout, so that each moves as one piece.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sculptor.streaming.layout import Layout
from sculptor.world import World


def choose_owners(blocks: Sequence[Mapping[str, float]], size: int) -> list[dict[str, int]]:
    """An owner for every parameter: of each block the largest first, to whoever holds the least so far.

    Args:
        blocks: of each block, parameter -> bytes that its owner holds for it.
        size: how many processes there are.
    """
    held = [0.0] * size
    chosen: list[dict[str, int]] = []
    for block in blocks:
        owners = {}
        for name in sorted(block, key=lambda name: (-block[name], name)):
            owners[name] = min(range(size), key=lambda rank: (held[rank], rank))
            held[owners[name]] += block[name]
        chosen.append(owners)
    return chosen


@dataclass(frozen=True, slots=True)
class Owners:
    """The owners of the parameters of all blocks.

    Attributes:
        world: the processes.
        blocks: of each block, parameter -> rank.
    """

    world: World
    blocks: Sequence[Mapping[str, int]]

    def mine(self, block: int, name: str) -> bool:
        """Whether a parameter is this process's."""
        return self.blocks[block][name] == self.world.rank

    def order(self, block: int, name: str) -> int:
        """Where in a layout a parameter has to be for its owner's to lie together."""
        return self.blocks[block][name]

    def parts(self, block: int, layout: Layout) -> list[tuple[int, int, int]]:
        """Owner, first byte and one past the last of its part of a layout, for all that own something there."""
        found: dict[int, tuple[int, int]] = {}
        for name, span in layout.items():
            owner = self.blocks[block][name]
            found[owner] = found.get(owner, (span.start, 0))[0], span.stop
        return [(owner, *ends) for owner, ends in sorted(found.items())]

    def my_part(self, block: int, layout: Layout) -> tuple[int, int]:
        """This process's part, which may be empty."""
        return next(((a, b) for owner, a, b in self.parts(block, layout) if owner == self.world.rank), (0, 0))

    def show(self, block: int, layout: Layout, memory: Tensor) -> None:
        """Completes a block of which each process has its own part; for all of them to call."""
        for owner, start, stop in self.parts(block, layout):
            self.world.show(owner, memory[start:stop])
