"""Moving is converting, whichever comes first."""

import pytest
import torch

from sculptor.numerics.transfer import moved


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_arrives_is_what_torch_makes_of_it(
    source: torch.dtype, target: torch.dtype, device: str, generator: torch.Generator
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    tensor = torch.randn(5, 3, dtype=torch.float64, generator=generator).to(source)
    there = moved(tensor, device, target)
    assert there.dtype == target
    assert there.device.type == device
    assert torch.equal(there.cpu(), tensor.to(target))
    assert torch.equal(moved(there, "cpu", source), tensor.to(target).to(source))
