"""What each of several processes holds of a model that is divided among them: as training chooses owners."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sculptor.methods.rule import cost_of
from sculptor.planning.matrices import PlannedMatrix
from sculptor.streaming.owners import choose_owners
from sculptor.training.stepping.prepare import held_bytes


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part.

    Attributes:
        weights: bytes of weights; `pristine` of W0 beside them, `bases` of bases, `block_bases` of those of one block at most.
        coordinates: how many are trained.
        kept: bytes of what the optimizer keeps of each of them.
    """

    weights: float = 0.0
    pristine: float = 0.0
    bases: float = 0.0
    coordinates: float = 0.0
    block_bases: float = 0.0
    kept: int = 8

    @property
    def state(self) -> float:
        """A, its gradients and moments."""
        return (8.0 + self.kept) * self.coordinates

    @property
    def num_bytes(self) -> float:
        """All of it."""
        return self.weights + self.pristine + self.bases + self.state


def shares(
    blocks: Mapping[str, Mapping[str, float]],
    matrices: Mapping[str, Sequence[PlannedMatrix]],
    file_size: int,
    kind: str,
    processes: int,
    kept: int,
) -> list[Share]:
    """By rank.

    Args:
        blocks: of each block, parameter -> bytes of its weights on the device.
        matrices: those that are trained, by parameter.
        file_size: bytes of a number of W0.
        kind: of the device, cuda or cpu.
        processes: how many there are.
        kept: bytes of what the optimizer keeps of each trained number.
    """
    size = 2 if kind == "cuda" else 4
    beside = {
        parameter: sum(held_bytes(m.rule, m.names, file_size * m.num_entries, kind, kept) for m in found)
        for parameter, found in matrices.items()
    }
    held = [{name: num + beside.get(name, 0.0) for name, num in block.items()} for block in blocks.values()]
    owners = choose_owners(held, processes)
    return [
        replace(_share([*zip(blocks.values(), owners, strict=True)], matrices, file_size, size, rank), kept=kept)
        for rank in range(processes)
    ]


def _share(
    blocks: Sequence[tuple[Mapping[str, float], Mapping[str, int]]],
    matrices: Mapping[str, Sequence[PlannedMatrix]],
    file_size: int,
    size: int,
    rank: int,
) -> Share:
    weights = pristine = coordinates = 0.0
    bases: list[float] = []
    for block, owners in blocks:
        mine = [name for name in block if owners[name] == rank]
        ours = [matrix for name in mine if name in matrices for matrix in matrices[name]]
        weights += sum(block[name] for name in mine)
        pristine += sum(file_size * m.num_entries for m in ours)
        coordinates += sum(m.num_free for m in ours)
        numbers: dict[str, int] = {}  # what matrices share is there once
        for m in ours:
            numbers |= cost_of(m.rule, m.names).numbers
        bases.append(size * sum(numbers.values()))
    return Share(weights, pristine, sum(bases), coordinates, max(bases, default=0.0))
