"""One value that is not finite is seen wherever it stands, in every dtype."""

import math

import pytest
import torch

from sculptor.numerics.finite import is_finite

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 33, 1000, 4097])
def test_one_bad_value_is_seen(dtype: torch.dtype, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert is_finite(values)
    for bad in (math.nan, math.inf, -math.inf):
        for at in {0, size // 2, size - 1}:
            changed = values.clone()
            changed[at] = bad
            assert not is_finite(changed), (bad, at)
            assert not is_finite(changed.reshape(1, -1).T), "of a view, too"


def test_what_cannot_be_infinite_is_finite() -> None:
    assert is_finite(torch.tensor([2**62]))
    assert is_finite(torch.tensor([True]))
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.tensor([448.0]).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([math.nan]).to(torch.float8_e4m3fn))
