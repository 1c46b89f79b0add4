"""Chosen entries, and their bits."""

import pytest
import torch

from sculptor.numerics.masks import at_random, largest_share, num_words, pack, smallest, unpack


@pytest.mark.parametrize("count", [1, 7, 30, 60])
def test_the_smallest_are_those_of_a_sort(count: int, generator: torch.Generator) -> None:
    values = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    mask, threshold = smallest(values, count)
    order = values.abs().flatten().argsort(stable=True)
    expected = torch.zeros(60, dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(mask.flatten(), expected)
    assert threshold == float(values.abs().flatten()[order[count - 1]])


def test_of_equal_ones_the_first() -> None:
    values = torch.tensor([[2.0, -1.0, 1.0], [1.0, 0.0, -1.0]])
    mask, threshold = smallest(values, 3)
    assert mask.tolist() == [[False, True, True], [False, True, False]]
    assert threshold == 1


def test_the_fewest_that_hold_a_share() -> None:
    values = torch.tensor([[3.0, -2.0], [1.0, 0.0]])  # squares 9, 4, 1
    assert largest_share(values, 9 / 14 - 1e-9, 4).tolist() == [[True, False], [False, False]]
    assert largest_share(values, 0.95, 4).tolist() == [[True, True], [True, False]]
    assert largest_share(values, 0.95, 2).tolist() == [[True, True], [False, False]]
    assert largest_share(values, 0.95, 0).sum() == 0
    assert largest_share(torch.zeros(2, 2), 0.95, 4).sum() == 0


@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (3, 11), (16, 64)])
def test_bits_come_back(shape: tuple[int, int], generator: torch.Generator) -> None:
    mask = torch.rand(shape, generator=generator) < 0.4
    words = pack(mask)
    assert words.dtype == torch.int32
    assert words.shape == (num_words(mask.numel()),)
    assert torch.equal(unpack(words, shape), mask)
    value = sum(1 << i for i, bit in enumerate(mask.flatten()[:31].tolist()) if bit)
    assert int(words[0]) & 0x7FFFFFFF == value


def test_chance_is_that_of_the_text() -> None:
    first = at_random((8, 9), 20, "a")
    assert int(first.sum()) == 20
    assert torch.equal(first, at_random((8, 9), 20, "a"))
    assert not torch.equal(first, at_random((8, 9), 20, "b"))
