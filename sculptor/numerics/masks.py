"""Which entries of a matrix are chosen, as one bit each."""

import torch
from torch import Tensor

from sculptor.numerics.chance import generator_of


def smallest(values: Tensor, count: int) -> tuple[Tensor, float]:
    """The `count` entries of the least magnitude; of equal ones the first in row-major order.

    Args:
        values: any shape.
        count: 1 or more, at most all.

    Returns:
        A bool tensor of that shape, and the largest magnitude that was chosen.
    """
    magnitude = values.abs().flatten()
    threshold = magnitude.kthvalue(count).values
    chosen = magnitude < threshold
    equal = (magnitude == threshold).nonzero()[:, 0]
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen.view(values.shape), float(threshold)


def largest_share(values: Tensor, share: float, most: int) -> Tensor:
    """The fewest entries that hold a share of the squared norm, the largest first, at most so many; a bool tensor."""
    squares = values.square().flatten()
    order = squares.argsort(descending=True, stable=True)
    count = int((squares[order].cumsum(0) < share * squares.sum()).sum()) + 1
    chosen = torch.zeros_like(squares, dtype=torch.bool)
    chosen[order[: min(count, most)]] = True
    return chosen.view(values.shape) & (values != 0)


def at_random(shape: tuple[int, int], count: int, seed: str) -> Tensor:
    """`count` entries by chance, the same for the same text; a bool tensor."""
    return smallest(torch.rand(shape, dtype=torch.float64, generator=generator_of(seed)), count)[0]


def num_words(entries: int) -> int:
    """int32 numbers that hold so many bits."""
    return -(-entries // 32)


def pack(chosen: Tensor) -> Tensor:
    """Bits of a bool tensor in row-major order as int32 numbers, the first in the lowest bit; on the CPU."""
    bits = chosen.flatten().cpu()
    padded = torch.zeros(32 * num_words(bits.numel()), dtype=torch.uint8)
    padded[: bits.numel()] = bits
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8).view(torch.int32)


def unpack(words: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`, on the CPU."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (words.cpu().contiguous().view(torch.uint8)[:, None] >> shifts) & 1
    return bits.flatten()[: shape[0] * shape[1]].to(torch.bool).view(shape)
