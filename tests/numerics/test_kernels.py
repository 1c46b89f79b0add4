"""Kernels of a CPU: how many are kept, and which attention short rows get."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sculptor.numerics.kernels import attention, keep_kernels, multiple_of_lengths

CPU = torch.device("cpu")
CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize(("said", "expected"), [(None, "4096"), ("17", "17")])
def test_as_many_are_kept_as_somebody_said(monkeypatch: pytest.MonkeyPatch, said: str | None, expected: str) -> None:
    monkeypatch.delenv(CAPACITY, raising=False)
    if said is not None:
        monkeypatch.setenv(CAPACITY, said)
    keep_kernels()
    assert os.environ[CAPACITY] == expected


@pytest.mark.parametrize(
    ("device", "dtype", "length", "chosen"),
    [
        ("cpu", torch.bfloat16, 128, True),
        ("cpu", torch.bfloat16, 129, False),
        ("cpu", torch.float32, 8, False),
        ("cuda", torch.bfloat16, 8, False),
    ],
)
def test_short_rows_in_bfloat16_on_a_cpu_get_products(
    device: str, dtype: torch.dtype, length: int, chosen: bool
) -> None:
    with attention(torch.device(device), dtype, length):
        assert torch.backends.cuda.flash_sdp_enabled() is not chosen
    assert torch.backends.cuda.flash_sdp_enabled()
    assert multiple_of_lengths(torch.device(device), dtype) == (8 if (device, dtype) == ("cpu", torch.bfloat16) else 1)


def test_their_attention_and_gradients_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, 3, 24, 16, generator=generator, dtype=torch.float64) for _ in range(4)]

    def found(dtype: torch.dtype) -> list[Tensor]:
        given = [each.to(dtype).detach().requires_grad_() for each in made[:3]]
        out = scaled_dot_product_attention(*given, is_causal=True)
        return [each.detach().double() for each in (out, *torch.autograd.grad(out, given, made[3].to(dtype)))]

    expected = found(torch.float64)
    with attention(CPU, torch.bfloat16, 24):
        given = found(torch.bfloat16)
    for one, other in zip(given, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02
