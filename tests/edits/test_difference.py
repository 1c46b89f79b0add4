"""Sums of a base and a part of a difference against float64, their exact ends, and their norms."""

import pytest
import torch

from sculptor.checkpoint.places import Place
from sculptor.edits import difference
from sculptor.edits.difference import Where, blend, edit_tensor
from sculptor.errors import EditError

WHERE = Where("w", None, Place("w", "w", None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("factor", [0.25, 0.9])
def test_it_is_the_sum_rounded_once(dtype: torch.dtype, factor: float, generator: torch.Generator) -> None:
    base, tuned = (torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    found = edit_tensor(WHERE, base, tuned, factor, dtype)
    exact = base.double() + factor * (tuned.double() - base.double())
    assert torch.equal(found.tensor, exact.to(dtype))
    moved = found.tensor.double() - base.double()
    expected = [float(x.square().sum()) for x in (base.double(), tuned.double() - base.double(), moved)]
    assert list(found.norms) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_the_ends_are_exact(factor: float, generator: torch.Generator) -> None:
    """Also where the difference of the two is no number of float64, and where zeros have signs."""
    base = torch.randn(3, 4, generator=generator)
    tuned = torch.randn(3, 4, generator=generator) * 1e-20
    base[0, 0], tuned[0, 0] = 0.0, -0.0
    found = edit_tensor(WHERE, base, tuned, factor, torch.float32).tensor
    expected = tuned if factor else base
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_entries_that_keep_all_or_nothing_keep_their_bits(generator: torch.Generator) -> None:
    base = torch.randn(4, 4, generator=generator)
    base[0] = -0.0
    tuned = torch.randn(4, 4, generator=generator) * 1e-20
    whole = tuned.double() - base.double()
    kept = whole.clone()
    kept[:2] = 0
    found = edit_tensor(WHERE, base, tuned, 1.0, torch.float32, kept).tensor
    assert torch.equal(found[:2].view(torch.int32), base[:2].view(torch.int32))
    assert torch.equal(found[2:].view(torch.int32), tuned[2:].view(torch.int32))


def test_pieces_do_not_change_it(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = (torch.randn(7, 2, 3, generator=generator) for _ in range(2))
    kept = torch.randn(7, 2, 3, generator=generator, dtype=torch.float64)
    whole = edit_tensor(WHERE, base, tuned, 0.3, torch.bfloat16, kept)
    monkeypatch.setattr(difference, "_PIECE", 12)
    found = edit_tensor(WHERE, base, tuned, 0.3, torch.bfloat16, kept)
    assert torch.equal(found.tensor, whole.tensor)
    assert list(found.norms) == pytest.approx(list(whole.norms), rel=1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,)])
def test_degenerate_shapes(shape: tuple[int, ...]) -> None:
    found = edit_tensor(WHERE, torch.zeros(shape), torch.ones(shape), 0.5, torch.float32)
    assert torch.equal(found.tensor, torch.full(shape, 0.5))


def test_what_does_not_fit_is_refused() -> None:
    base, tuned = torch.zeros(2), torch.full((2,), 1e30)
    with pytest.raises(EditError, match=r"^w: values overflow torch.float16; use --save-dtype float32"):
        edit_tensor(WHERE, base, tuned, 0.5, torch.float16)


def test_the_inputs_stay_as_they_were(generator: torch.Generator) -> None:
    base, tuned = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    before = base.clone(), tuned.clone()
    blend(base, tuned, 0.5)
    edit_tensor(WHERE, base, tuned, 0.5, torch.float64)
    assert torch.equal(base, before[0])
    assert torch.equal(tuned, before[1])
