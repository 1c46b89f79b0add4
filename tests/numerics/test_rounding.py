"""Units in the last place, and the rounding they predict."""

import pytest
import torch

from sculptor.numerics.rounding import leak_allowance, rms, rounding_variance, ulp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ulp_is_the_gap_to_the_next_number(dtype: torch.dtype, generator: torch.Generator) -> None:
    values = (torch.randn(2000, generator=generator) * 10 ** torch.linspace(-4, 3, 2000)).to(dtype)
    up = torch.nextafter(values.abs(), torch.full_like(values, float("inf")))
    torch.testing.assert_close(ulp(values), up.double() - values.abs().double(), rtol=0, atol=0)


def test_ulp_of_zero_and_subnormals_is_the_smallest_gap() -> None:
    values = torch.tensor([0.0, 1e-45, 1e-39], dtype=torch.float32)
    assert torch.equal(ulp(values), torch.full((3,), 2.0**-149, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_variance_predicts_the_error(dtype: torch.dtype, generator: torch.Generator) -> None:
    exact = torch.randn(300, 300, dtype=torch.float64, generator=generator)
    stored = exact.to(dtype)
    assert float((stored.double() - exact).norm()) == pytest.approx(
        float(rounding_variance(stored).sum()) ** 0.5, rel=0.02
    )


def test_leak_allowance_is_the_rule() -> None:
    assert leak_allowance(0.0, 10**6) == 1e-6
    assert leak_allowance(1e-2, 64) > 1.3e-2
    assert leak_allowance(1e-2, 128) == pytest.approx((1e-12 + (1.25e-2) ** 2) ** 0.5)


@pytest.mark.parametrize("size", [0, 1, 2**15, 100_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_is_that_of_all_entries_with_any_number_of_threads(
    size: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    values = torch.randn(size, generator=generator).to(dtype)
    expected = (sum(x * x for x in values.double().tolist()) / max(1, size)) ** 0.5
    assert rms(values) == pytest.approx(expected, rel=1e-12, abs=0)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(rms(values))
    torch.set_num_threads(threads)
    assert found[0] == found[1] == rms(values)
