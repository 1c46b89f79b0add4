"""Differences in few numbers: what comes back, and when factors are no saving."""

import pytest
import torch

from sculptor.edits.compact import compact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_of_low_rank_is_two_factors(generator: torch.Generator, dtype: torch.dtype) -> None:
    base = torch.randn(60, 40, generator=generator).to(dtype)
    update = torch.randn(60, 3, generator=generator) @ torch.randn(3, 40, generator=generator) / 10
    tuned = (base.double() + update.double()).to(dtype)
    found = compact(base, tuned)
    assert found.right is not None
    assert found.left.shape[1] <= 5
    back = (base.double() + found.whole()).to(dtype)
    step = torch.finfo(dtype).eps * tuned.abs().max()
    assert float((back.double() - tuned.double()).abs().max()) <= 2 * float(step)


def test_what_has_full_rank_is_kept_as_it_is(generator: torch.Generator) -> None:
    base, tuned = torch.randn(2, 30, 20, generator=generator)
    found = compact(base, tuned)
    assert found.right is None
    torch.testing.assert_close((base.double() + found.whole()).float(), tuned, rtol=3e-7, atol=3e-7)
    cut = compact(base, tuned, rank=2)
    u, s, vh = torch.linalg.svd((tuned - base).double())
    torch.testing.assert_close(cut.whole(), (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (1, 1), (0, 3)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    base = torch.zeros(shape)
    assert torch.equal(compact(base, base + 1).whole(), torch.ones(shape, dtype=torch.float64))
