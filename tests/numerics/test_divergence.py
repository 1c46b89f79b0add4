"""KL of predictions against float64, and what a truncated one promises."""

import math

import pytest
import torch

from sculptor.numerics.divergence import Truncated, divergence, estimated_divergence, truncate, truncated_divergence


def reference(base: torch.Tensor, new: torch.Tensor) -> list[float]:
    """Token by token, in float64, with no function of torch's but exp."""
    found = []
    for a, b in zip(base.double(), new.double(), strict=True):
        p, q = ((x - x.max()).exp() / (x - x.max()).exp().sum() for x in (a, b))
        found.append(math.fsum(float(x) * math.log(float(x) / float(y)) for x, y in zip(p, q, strict=True) if x > 0))
    return found


def truncated_reference(base: torch.Tensor, new: torch.Tensor, k: int) -> list[float]:
    found = []
    for a, b in zip(base.double(), new.double(), strict=True):
        p, q = ((x - x.max()).exp() / (x - x.max()).exp().sum() for x in (a, b))
        top = sorted(range(len(p)), key=lambda i: -float(p[i]))[:k]
        rest = [i for i in range(len(p)) if i not in top]
        parts = [[float(x[i]) for i in top] + [math.fsum(float(x[i]) for i in rest)] for x in (p, q)]
        found.append(math.fsum(x * math.log(x / y) for x, y in zip(*parts, strict=True)))
    return found


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_both_agree_with_float64_and_the_truncated_one_is_below(scale: float, generator: torch.Generator) -> None:
    base = 4 * torch.randn(40, 33, generator=generator)
    new = base + scale * torch.randn(40, 33, generator=generator)
    whole = divergence(base, new)
    assert whole.tolist() == pytest.approx(reference(base, new), rel=1e-3, abs=2e-6)
    assert divergence(base.double(), new.double()).tolist() == pytest.approx(reference(base, new), rel=1e-9, abs=1e-14)
    before = torch.zeros(40)
    for k in (1, 4, 16, 32):
        bound = truncated_divergence(truncate(base, k, 0, generator), new)
        assert bound.tolist() == pytest.approx(truncated_reference(base, new, k), rel=1e-3, abs=2e-6)
        assert bool((bound <= whole * (1 + 1e-6) + 2e-6).all())
        assert bool((bound >= before * (1 - 1e-6) - 2e-6).all()), "more tokens tell more"
        before = bound
    assert before.tolist() == pytest.approx(whole.tolist(), rel=1e-3, abs=2e-6), "all but one token is all"


def test_it_is_zero_for_what_did_not_change_and_at_its_least_there(generator: torch.Generator) -> None:
    base = 5 * torch.randn(9, 20, generator=generator)
    known = truncate(base, 6, 3, generator)
    assert float(truncated_divergence(known, base).abs().max()) < 1e-6
    assert float(estimated_divergence(known, base).abs().max()) < 1e-5
    assert float(divergence(base, base).abs().max()) == 0
    logits = base.double().requires_grad_()
    truncated_divergence(known, logits).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-6  # type: ignore[union-attr]


def test_tokens_drawn_from_the_rest_estimate_what_is_lost_in_it(generator: torch.Generator) -> None:
    """In float64 with every token of the rest in its proportion it is the whole; with random ones, on average."""
    p = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)  # the rest in parts of 2, 2, 1, 1
    base = p.log().repeat(5, 1)
    new = base + torch.randn(5, 6, generator=generator, dtype=torch.float64)
    drawn = torch.tensor([2, 2, 3, 3, 4, 5], dtype=torch.int32).repeat(5, 1)
    shares = (p[drawn.long()] / 0.3).log()
    merged = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64).log().repeat(5, 1)
    known = Truncated(torch.tensor([0, 1], dtype=torch.int32).repeat(5, 1), merged, drawn, shares)
    assert estimated_divergence(known, new).tolist() == pytest.approx(reference(base, new), rel=1e-12)
    assert bool((truncated_divergence(known, new) < estimated_divergence(known, new)).all())

    base = 3 * torch.randn(4, 50, generator=generator)
    new = base + torch.randn(4, 50, generator=generator)
    new[:, -1] += 8  # nearly all of the rest goes to one token that is seldom drawn
    many = truncate(base, 5, 40_000, generator)
    assert many.drawn.shape == (4, 40_000)
    assert not (many.drawn[:, :, None] == many.ids[:, None, :5]).any(), "from the rest alone"
    assert estimated_divergence(many, new).tolist() == pytest.approx(reference(base, new), rel=0.03)


def test_a_rest_of_no_mass_counts_nothing(generator: torch.Generator) -> None:
    base = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    new = torch.tensor([[1.5, 2.0, 0.0, -torch.inf]])
    known = truncate(base, 2, 4, generator)
    assert estimated_divergence(known, new).tolist() == pytest.approx(divergence(base, new).tolist(), rel=1e-5)


def test_logits_far_out_stay_finite(generator: torch.Generator) -> None:
    base = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]])
    new = torch.tensor([[0.0, 200.0, -200.0], [300.0, 0.0, 0.0]])
    known = truncate(base, 1, 0, generator)
    assert truncated_divergence(known, new).tolist() == pytest.approx([200.0, 2 / 3 * 300 + math.log(1 / 3) / 3 + 2 / 3 * (
        math.log(2 / 3) - math.log(2))], rel=1e-5)  # fmt: skip
    assert bool(divergence(base, new).isfinite().all())
    impossible = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert (
        float(divergence(impossible, impossible))
        == float(truncated_divergence(truncate(impossible, 2, 0, generator), impossible))
        == 0
    )


def test_it_is_the_same_every_time(generator: torch.Generator) -> None:
    base, new = torch.randn(2, 7, 30, generator=generator)
    one, other = (estimated_divergence(truncate(base, 5, 4, torch.Generator().manual_seed(2)), new) for _ in range(2))
    assert torch.equal(one, other)


def test_what_does_not_belong_together_is_refused(generator: torch.Generator) -> None:
    known = truncate(torch.randn(5, 8, generator=generator), 20, 2, generator)
    assert known.ids.shape == (5, 7), "one token is always among the rest"
    with pytest.raises(ValueError, match="do not go with"):
        truncated_divergence(known, torch.zeros(4, 8))
    with pytest.raises(ValueError, match="one shape"):
        divergence(torch.zeros(4, 8), torch.zeros(4, 9))
    for logits, k in ((torch.zeros(4, 1), 1), (torch.zeros(4), 1), (torch.zeros(4, 5), 0)):
        with pytest.raises(ValueError, match="expected logits"):
            truncate(logits, k, 0, generator)
    assert estimated_divergence(truncate(torch.zeros(0, 8), 3, 4, generator), torch.zeros(0, 8)).shape == (0,)
