"""Matrices that are folded together: nothing is stale, whoever asks and whatever gets a gradient."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from transformers import AutoModelForCausalLM

from sculptor import AnalyzeSettings, analyze, merge, protect
from sculptor.training.linear import SMALL
from sculptor.training.protect import protected_matrices
from sculptor.training.stack import Stack


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and archive by basis."""
    root = tmp_path_factory.mktemp("stack")
    model = save_checkpoint(root / "model")
    rows = write_rows(root / "rows.jsonl", task_rows())
    analyze(model, root / "weights", AnalyzeSettings(preserve=0.5, device="cpu"))
    analyze(model, root / "curvature", AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu"))
    return {basis: (model, root / basis) for basis in ("weights", "curvature")}


@pytest.fixture(params=["weights", "curvature"])
def basis(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def protected(made: dict[str, tuple[Path, Path]], basis: str, together: bool, monkeypatch: Any, **options: Any) -> Any:
    monkeypatch.setitem(SMALL, "cpu", 10**9 if together else 0)
    path, archive = made[basis]
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    soften = 3.0 if basis == "curvature" else 0.0
    return protect(model, archive, soften=soften, **options)


def ids(seed: int) -> torch.Tensor:
    return torch.randint(4, 44, (3, 8), generator=torch.Generator().manual_seed(seed))


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def stacks_of(model: Any) -> set[Stack]:
    return {matrix.coordinates.source for matrix in protected_matrices(model)}  # type: ignore[misc]


def test_training_together_is_training_one_by_one(
    made: dict[str, tuple[Path, Path]], basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for together in (False, True):
        model = protected(made, basis, together, monkeypatch)
        assert (len(stacks_of(model)) < len(protected_matrices(model))) == together
        stepper = torch.optim.SGD(trained(model), lr=0.05)
        for step in range(4):
            model(input_ids=ids(step), labels=ids(step)).loss.backward()
            stepper.step()
            stepper.zero_grad()
        merge(model)
        assert not model._forward_pre_hooks
        results.append({name: p.detach() for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, atol=1e-5, rtol=1e-4)


def test_matrices_without_a_gradient_have_none(
    made: dict[str, tuple[Path, Path]], basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block runs by itself: the others of its stacks get nothing, and it gets what it gets alone."""
    found = []
    for together in (False, True):
        model = protected(made, basis, together, monkeypatch)
        x = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        model.model.layers[0].mlp(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in found[0].items():
        assert (expected is not None) == (".layers.0.mlp." in name)
        if expected is None:
            assert found[1][name] is None
        else:
            torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_step_is_seen_though_no_counter_moves(
    made: dict[str, tuple[Path, Path]], basis: str, monkeypatch: pytest.MonkeyPatch, together: bool, whole: bool
) -> None:
    """Passes of the model, and of the part that holds the blocks; an evaluation in between; a step behind every counter."""
    model = protected(made, basis, together, monkeypatch)
    run = model if whole else model.model

    def outputs() -> torch.Tensor:
        return run(input_ids=ids(0))[0]

    stepper = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
    seen = []
    for _ in range(3):
        outputs().square().mean().backward()
        with torch.no_grad():
            outputs()  # nothing has changed yet
        stepper.step()
        stepper.zero_grad()
        with torch.inference_mode():
            seen.append(outputs().clone())
    fresh = copy.deepcopy(model)
    for stack in stacks_of(fresh):
        stack.expire()
    with torch.no_grad():
        expected = (fresh if whole else fresh.model)(input_ids=ids(0))[0]
    torch.testing.assert_close(seen[-1], expected, atol=0, rtol=0)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "negated": lambda a: a.neg_(),
    "negated behind the counter": lambda a: a.data.neg_(),
    "turned round": lambda a: a.copy_(a.flip(0)),
    "turned round behind the counter": lambda a: a.data.copy_(a.flip(0)),
    "moved by one row": lambda a: a.data.copy_(a.roll(1, 0)),
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("how", list(CHANGES))
def test_the_same_numbers_in_other_places_are_seen(
    made: dict[str, tuple[Path, Path]], basis: str, monkeypatch: pytest.MonkeyPatch, together: bool, how: str,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """As in search without gradients: of what is changed so, neither the sum nor the exclusive or of all bits changes."""
    model = protected(made, basis, together, monkeypatch)
    with torch.no_grad():
        for a in trained(model):
            drawn = torch.randn(a.numel() // 2, generator=generator) * 0.05  # as many below 0 as above
            a.copy_(torch.cat([drawn.abs(), -drawn.abs(), torch.zeros(a.numel() % 2)]).view(a.shape))
        before = model(input_ids=ids(0))[0]
        for a in trained(model):
            CHANGES[how](a)
        found = model(input_ids=ids(0))[0]
        fresh = copy.deepcopy(model)
        for stack in stacks_of(fresh):
            stack.expire()
        expected = fresh(input_ids=ids(0))[0]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("together", [False, True])
def test_a_copy_folds_for_itself(
    made: dict[str, tuple[Path, Path]], basis: str, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    model = protected(made, basis, together, monkeypatch)
    before = model(input_ids=ids(0)).logits.detach()
    other = copy.deepcopy(model)
    assert not stacks_of(model) & stacks_of(other)
    with torch.no_grad():
        for parameter in trained(other):
            parameter.add_(0.01)
    assert torch.equal(model(input_ids=ids(0)).logits, before)
    changed = other(input_ids=ids(0)).logits.detach()
    assert not torch.equal(changed, before)
    merge(other)
    torch.testing.assert_close(other(input_ids=ids(0)).logits, changed, atol=1e-4, rtol=1e-3)
    assert torch.equal(model(input_ids=ids(0)).logits, before)


def test_two_losses_that_share_a_pass_add_up(
    made: dict[str, tuple[Path, Path]], basis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = protected(made, basis, True, monkeypatch)
    losses = [model(input_ids=ids(seed), labels=ids(seed)).loss for seed in (0, 1)]  # both graphs are alive
    for loss in losses:
        loss.backward()
    apart = [p.grad.clone() for p in trained(model) if p.grad is not None]
    model.zero_grad()
    sum(model(input_ids=ids(seed), labels=ids(seed)).loss for seed in (0, 1)).backward()
    for one, p in zip(apart, trained(model), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, one, atol=1e-6, rtol=1e-4)
