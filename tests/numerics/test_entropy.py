"""Weights of tokens by the entropy of their prediction."""

import math

import pytest
import torch

from sculptor.numerics.entropy import entropy_weights


def test_it_is_the_entropy_of_the_likeliest_tokens(generator: torch.Generator) -> None:
    logits = 3 * torch.randn(5, 40, generator=generator)
    for row, found in zip(logits.double().tolist(), entropy_weights(logits, 20).tolist(), strict=True):
        largest = sorted(row)[-20:]
        total = sum(math.exp(x) for x in largest)
        expected = -sum(math.exp(x) / total * (x - math.log(total)) for x in largest) / math.log(20)
        assert found == pytest.approx(expected, abs=1e-6)


def test_it_is_one_for_the_undecided_and_nothing_for_the_certain(generator: torch.Generator) -> None:
    undecided, certain = torch.zeros(1, 30), torch.zeros(1, 30)
    certain[0, 3] = 1e4
    assert entropy_weights(undecided).tolist() == pytest.approx([1.0])
    assert entropy_weights(certain).tolist() == [0.0]
    small = torch.randn(4, 3, generator=generator).requires_grad_(True)
    found = entropy_weights(small)
    assert bool(((found > 0) & (found <= 1)).all())
    assert not found.requires_grad
    assert torch.allclose(found, entropy_weights(small + 7), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1), (4,)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(tokens, vocabulary\)"):
        entropy_weights(torch.zeros(shape))
