"""Matrices as files store them, and as (out, in)."""

import pytest
import torch

from sculptor.checkpoint.orientation import as_out_in, to_device

CPU = torch.device("cpu")


def test_a_transposed_one_is_turned_and_shares_its_memory(generator: torch.Generator) -> None:
    stored = torch.randn(3, 5, generator=generator)
    turned = as_out_in(stored, True)
    assert turned.shape == (5, 3)
    assert torch.equal(turned, stored.T)
    assert turned.data_ptr() == stored.data_ptr()
    assert as_out_in(stored, False) is stored
    assert torch.equal(as_out_in(as_out_in(stored, True), True), stored), "its own inverse"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_on_the_device_it_is_float64_with_the_same_values(
    dtype: torch.dtype, transposed: bool, generator: torch.Generator
) -> None:
    stored = torch.randn(3, 5, generator=generator).to(dtype)
    found = to_device(stored, transposed, CPU)
    assert found.dtype == torch.float64
    assert found.shape == ((5, 3) if transposed else (3, 5))
    assert torch.equal((found.T if transposed else found).to(dtype), stored)
