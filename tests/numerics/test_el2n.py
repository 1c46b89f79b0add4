"""EL2N: against autograd in float64, and its ends."""

import torch

from sculptor.numerics.el2n import error_norms


def test_it_is_the_gradient_by_the_logits(generator: torch.Generator) -> None:
    logits = (5 * torch.randn(20, 30, generator=generator, dtype=torch.float64)).requires_grad_(True)
    labels = torch.randint(30, (20,), generator=generator)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    torch.testing.assert_close(error_norms(logits.detach(), labels), logits.grad.norm(dim=1), rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]


def test_its_ends_and_no_tokens() -> None:
    sure = torch.tensor([[100.0, 0.0], [100.0, 0.0]], dtype=torch.bfloat16)
    torch.testing.assert_close(error_norms(sure, torch.tensor([0, 1])), torch.tensor([0.0, 2**0.5]))
    assert error_norms(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)
