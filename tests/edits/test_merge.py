"""The merge against sums in float64, its one rounding, and what it refuses."""

import pytest
import torch
from torch import Tensor

from sculptor.archive.manifest import MatrixRecord
from sculptor.archive.store import Entry
from sculptor.edits.merge import FINGERPRINT_TOLERANCE, Merged, merge_matrix, same_fingerprint
from sculptor.errors import TrainingError
from sculptor.methods.method import Derived, Evidence
from sculptor.methods.rule import Working
from sculptor.methods.settings import AnalyzeSettings
from sculptor.methods.weights import Weights
from sculptor.numerics.staircase import Constraint

CPU = torch.device("cpu")


def entry_of(derived: Derived, transposed: bool) -> Entry:
    """A rule as an archive would hold it."""
    record = MatrixRecord(
        tensor="block.0.w.weight",
        part=None,
        parameter="block.0.w.weight",
        block="block.0",
        index=0,
        role="w",
        transposed=transposed,
        input_group="block.0.w",
        base_dtype="float32",
        base_digest="0" * 64,
        base_rms=1.0,
        rule=derived.rule,
        tensors={name: f"block.0.w.weight.{name}" for name in derived.tensors},
    )
    return Entry(record, derived.tensors)


def protect(weight: Tensor, transposed: bool, preserve: float, constraint: Constraint = "double") -> Entry:
    """A matrix as stored, its leading directions protected."""
    whole = (weight.T if transposed else weight).double()
    method = Weights(AnalyzeSettings(preserve=preserve, constraint=constraint))
    shape = (whole.shape[0], whole.shape[1])
    return entry_of(method.derive(Evidence("w", shape, lambda: whole)), transposed)


def merged(entry: Entry, coordinates: list[Tensor], weight: Tensor, dtype: torch.dtype) -> Merged:
    fingerprint = entry.rule.prepare(entry.tensors, Working(CPU, torch.float32)).fingerprint  # as in training
    return merge_matrix(entry, coordinates, weight, dtype, soften=0.0, fingerprint=fingerprint)


def drawn(entry: Entry, generator: torch.Generator, scale: float = 0.1) -> list[Tensor]:
    return [scale * torch.randn(shape, generator=generator) for shape in entry.rule.shapes]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_where_all_is_free_it_is_the_sum(transposed: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Without bases A is dW itself."""
    weight = torch.randn(12, 20, generator=generator).to(dtype)
    entry = protect(weight, transposed, 0.0)
    (a,) = drawn(entry, generator)
    found = merged(entry, [a], weight, dtype)
    update = a.double()
    assert found.update.dtype == torch.float64
    assert torch.equal(found.update, update), "(out, in), before rounding"
    stored = update.T if transposed else update
    assert torch.equal(found.tensor, (weight.double() + stored).to(dtype))
    assert found.tensor.shape == weight.shape
    assert found.tensor.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("constraint", ["double", "input", "core"])
@pytest.mark.parametrize("preserve", [0.25, 0.75])
def test_what_is_protected_stays_against_an_svd_in_float64(
    transposed: bool, constraint: Constraint, preserve: float, generator: torch.Generator
) -> None:
    weight = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    entry = protect(weight, transposed, preserve, constraint)
    values = drawn(entry, generator)
    found = merged(entry, values, weight, torch.float64)
    whole = weight.T if transposed else weight
    moved = (found.tensor.T if transposed else found.tensor) - whole
    torch.testing.assert_close(moved, found.update, atol=1e-14, rtol=0)
    norm = torch.cat([a.double().flatten() for a in values]).norm()
    assert float(found.update.norm()) == pytest.approx(float(norm), rel=1e-10), "||dW|| = ||A||"
    k = round(preserve * 12)
    u, _, vh = torch.linalg.svd(whole)
    left, right = u[:, :k], vh[:k].T
    kept = {
        "double": [left.T @ moved, moved @ right],
        "input": [moved @ right],
        "core": [left.T @ moved @ right],
    }[constraint]
    for part in kept:
        assert float(part.norm()) < 1e-12 * float(norm)


def test_it_is_linear_in_the_coordinates(generator: torch.Generator) -> None:
    weight = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    entry = protect(weight, False, 0.5, "core")
    one, two = drawn(entry, generator), drawn(entry, generator)
    both = [a.double() + b.double() for a, b in zip(one, two, strict=True)]
    updates = [merged(entry, values, weight, torch.float64).update for values in (one, two, both)]
    torch.testing.assert_close(updates[0] + updates[1], updates[2], atol=1e-13, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_what_does_not_change_keeps_its_bits(transposed: bool, zero: float, generator: torch.Generator) -> None:
    weight = torch.randn(4, 6, generator=generator).bfloat16()
    weight[:, 1] = -0.0
    weight[:, 2] = 0.0
    entry = protect(weight, transposed, 0.0)
    (a,) = drawn(entry, generator)
    stored = a.T if transposed else a
    stored[:, :4] = zero
    found = merged(entry, [a], weight, torch.bfloat16).tensor
    assert torch.equal(found.view(torch.int16)[:, :4], weight.view(torch.int16)[:, :4])
    assert bool((found[:, 4:] != weight[:, 4:]).any())


def test_other_bases_are_refused(generator: torch.Generator) -> None:
    weight = torch.randn(12, 20, generator=generator)
    entry = protect(weight, False, 0.5)
    values = drawn(entry, generator)
    fingerprint = entry.rule.prepare(entry.tensors, Working(CPU, torch.float32)).fingerprint
    assert fingerprint
    for i in range(len(fingerprint)):
        near, far = list(fingerprint), list(fingerprint)
        near[i] += 0.5 * FINGERPRINT_TOLERANCE
        far[i] += 3 * FINGERPRINT_TOLERANCE
        merge_matrix(entry, values, weight, torch.float32, soften=0.0, fingerprint=near)
        with pytest.raises(
            TrainingError, match=r"^block.0.w.weight: its bases complete differently than when training"
        ):
            merge_matrix(entry, values, weight, torch.float32, soften=0.0, fingerprint=far)
    with pytest.raises(TrainingError, match="complete differently"):
        merge_matrix(entry, values, weight, torch.float32, soften=0.0, fingerprint=fingerprint[:-1])
    other = protect(torch.randn(12, 20, generator=generator), False, 0.5)
    with pytest.raises(TrainingError, match="complete differently"):
        merge_matrix(other, values, weight, torch.float32, soften=0.0, fingerprint=fingerprint)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e6), (torch.bfloat16, 3.4e38), (torch.float32, 3.4e38)])
def test_what_does_not_fit_is_refused(dtype: torch.dtype, size: float) -> None:
    weight = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    entry = protect(torch.ones(2, 3), False, 0.0)
    a = torch.zeros(2, 3)
    a[1, 2] = size
    with pytest.raises(TrainingError, match=rf"block.0.w.weight: merged values overflow {dtype}; use --save-dtype"):
        merged(entry, [a], weight, dtype)
    assert bool(merged(entry, [a], weight, torch.float64).tensor.isfinite().all())


def test_values_that_are_not_finite_are_not_written() -> None:
    weight = torch.ones(2, 3)
    entry = protect(weight, False, 0.0)
    a = torch.zeros(2, 3)
    a[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"block.0.w.weight"):
        merged(entry, [a], weight, torch.float32)


def test_the_inputs_stay_as_they_were(generator: torch.Generator) -> None:
    weight = torch.randn(12, 20, generator=generator)
    entry = protect(weight, False, 0.5)
    values = [value.requires_grad_(True) for value in drawn(entry, generator)]
    before = weight.clone(), [value.detach().clone() for value in values]
    found = merged(entry, values, weight, torch.float32)
    assert not found.tensor.requires_grad
    assert torch.equal(weight, before[0])
    assert all(torch.equal(a.detach(), b) for a, b in zip(values, before[1], strict=True))


def test_fingerprints_are_the_same_up_to_rounding() -> None:
    assert same_fingerprint([], [])
    assert same_fingerprint([0.5, -0.25], [0.5 + 1e-6, -0.25])
    assert not same_fingerprint([0.5], [0.5, 0.5])
    assert not same_fingerprint([0.5], [0.5 + 2e-4])
    assert not same_fingerprint([float("nan")], [0.5])
