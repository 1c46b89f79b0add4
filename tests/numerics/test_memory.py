"""The memory of inputs, and directions free of it, against singular value decompositions of the rows themselves."""

import pytest
import torch
from torch import Tensor

from sculptor.numerics.bases import Basis, protected_directions
from sculptor.numerics.linalg import complement
from sculptor.numerics.memory import free_columns, grow, leading_free, random_free, without

CPU = torch.device("cpu")


def rows_of(generator: torch.Generator, d: int = 12, count: int = 200) -> Tensor:
    """x (count, d) with a decaying spectrum."""
    scales = 2.0 ** -torch.arange(d, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    return torch.randn(count, d, dtype=torch.float64, generator=generator) * scales.sqrt() @ turned


def moment_of(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def gpm(rows: Tensor, memory: Tensor, energy: float) -> Tensor:
    """Gradient projection memory (Saha et al. 2021) by the singular value decomposition of what M leaves of the rows."""
    rest = rows - rows @ memory @ memory.T
    _, values, right = torch.linalg.svd(rest, full_matrices=False)
    total, held = float(rows.square().sum()), float((rows @ memory).square().sum())
    count = 0
    while held + float(values[:count].square().sum()) < energy * total:
        count += 1
    return torch.cat([memory, right[:count].T], dim=1)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_growth_is_that_of_the_published_memory(energy: float, generator: torch.Generator) -> None:
    memory, reference = None, torch.zeros(12, 0, dtype=torch.float64)
    for _ in range(3):
        rows = rows_of(generator)
        memory, share = grow(moment_of(rows), memory, energy)
        reference = gpm(rows, reference, energy)
        assert memory is not None
        assert memory.vectors.shape[1] <= 6  # of protected and free directions the fewer
        protected = protected_directions(memory)
        torch.testing.assert_close(protected @ protected.T, reference @ reference.T, atol=1e-8, rtol=0)
        assert share == pytest.approx(float((rows @ reference).square().sum() / rows.square().sum()))
        assert share >= energy - 1e-12


def test_what_is_held_already_adds_nothing(generator: torch.Generator) -> None:
    moment = moment_of(rows_of(generator))
    memory, share = grow(moment, None, 0.9)
    again, same = grow(moment, memory, 0.9)
    assert again is memory
    assert same == pytest.approx(share)
    full, share = grow(moment, memory, 1.0)
    assert full is not None
    assert full.directions == 12
    assert share == pytest.approx(1)
    assert grow(torch.zeros(4, 4), None, 0.9) == (None, 1.0)


@pytest.mark.parametrize("k", [0, 3, 9])
def test_directions_are_the_leading_left_singular_vectors_of_what_is_free(k: int, generator: torch.Generator) -> None:
    moment = moment_of(rows_of(generator))
    basis, _ = torch.linalg.qr(torch.randn(12, k, dtype=torch.float64, generator=generator))
    memory = None if not k else Basis(basis, "leading") if k < 6 else Basis(complement(basis), "free")
    found = leading_free(moment, memory, 3)
    left = torch.linalg.svd(moment - basis @ basis.T @ moment)[0][:, :3]
    torch.testing.assert_close(found @ found.T, left @ left.T, atol=1e-8, rtol=0)
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64))
    assert float((basis.T @ found).norm()) < 1e-12
    drawn = random_free(memory, 12, 3, generator)
    torch.testing.assert_close(drawn.T @ drawn, torch.eye(3, dtype=torch.float64))
    assert float((basis.T @ drawn).norm()) < 1e-12


@pytest.mark.parametrize("form", ["leading", "free"])
def test_rounded_directions_are_made_free_again(form: str, generator: torch.Generator) -> None:
    basis, _ = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64, generator=generator))
    memory = Basis(basis, "leading") if form == "leading" else Basis(complement(basis), "free")
    chosen = leading_free(moment_of(rows_of(generator)), memory, 4)
    found = without(memory, chosen.bfloat16())
    assert float((basis.T @ found).norm()) < 1e-14
    torch.testing.assert_close(found.T @ found, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(found, chosen, atol=0.02, rtol=0)
    assert torch.equal(free_columns(None, 3, CPU), torch.eye(3, dtype=torch.float64))


def test_no_moment_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        grow(torch.full((3, 3), float("nan")), None, 0.9)
