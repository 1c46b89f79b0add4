"""A protected model as its base, and the divergence from it in the loss."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, train
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED
from sculptor.errors import SettingsError, Stopped
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.loss import batch_loss, predictions
from sculptor.training.base import BaseWeights
from sculptor.training.protect import attach_coordinates, protected_matrices

FAMILIES = ("llama", "gpt2", "t5", "bert")


def batch_of(generator: torch.Generator) -> Batch:
    ids = torch.randint(4, 44, (4, 12), generator=generator)
    return Batch(ids, torch.ones_like(ids), torch.where(torch.rand(ids.shape, generator=generator) < 0.3, IGNORED, ids))


def moved(path: Path, family: str) -> tuple[LoadedModel, LoadedModel, BaseWeights, list[torch.nn.Parameter]]:
    """A base, and the same protected, trained a little, with openly trained parameters."""
    model = save_checkpoint(path / "model", family)
    analyze(model, path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    base, loaded = (load_model(open_checkpoint(model), torch.device("cpu")) for _ in range(2))
    attach_coordinates(loaded.model, Archive(path / "archive"), fold="manual")
    head = loaded.model.get_output_embeddings().weight.requires_grad_(True)
    as_base = BaseWeights(loaded.model, {"head": head})
    generator = torch.Generator().manual_seed(2)
    trained = [a for matrix in protected_matrices(loaded.model) for a in matrix.coordinates.values]
    with torch.no_grad():
        for value in (*trained, head):
            value.add_(0.02 * torch.randn(value.shape, generator=generator))
    return base, loaded, as_base, [*trained, head]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_base_bit_for_bit_and_itself_again(
    family: str, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, loaded, as_base, trained = moved(tmp_path, family)
    batch, kind = batch_of(generator), loaded.kind
    with torch.no_grad():
        before = predictions(loaded.model, batch, kind)
        loaded.model.train()
        with as_base():
            assert torch.equal(predictions(loaded.model, batch, kind), predictions(base.model, batch, kind))
            assert not loaded.model.training
        assert loaded.model.training
        loaded.model.eval()
        assert torch.equal(predictions(loaded.model, batch, kind), before)
        with pytest.raises(RuntimeError, match="within"), as_base():
            raise RuntimeError("within")
        assert torch.equal(predictions(loaded.model, batch, kind), before)
    whole = []
    for size in (2**23, 64 * 5):  # in one piece, and a few tokens at a time
        monkeypatch.setattr("sculptor.model.loss.SLICE", {"cpu": size})
        found = batch_loss(loaded.model, batch, kind, as_base=as_base)
        assert found.divergence is not None
        (found.total + 3 * found.divergence).backward()  # type: ignore[no-untyped-call]
        whole.append([found.total.detach(), found.divergence.detach(), *(value.grad for value in trained)])
        for value in trained:
            value.grad = None
    p, q = (predictions(model, batch, kind).double().log_softmax(-1) for model in (base.model, loaded.model))
    assert float(whole[0][1]) == pytest.approx(float((p.exp() * (p - q)).detach().sum()), rel=1e-4)
    plain = batch_loss(loaded.model, batch, kind)
    assert plain.divergence is None
    torch.testing.assert_close(plain.total.detach(), whole[0][0])
    (plain.total + 3 * (p.exp() * (p - q)).sum()).backward()  # type: ignore[no-untyped-call]
    for first, second, value in zip(whole[0][2:], whole[1][2:], trained, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(first, value.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_training_with_it_stays_nearer_to_the_base(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = TrainSettings(
        max_steps=6,
        batch_size=8,
        learning_rate=1e-2,
        device="cpu",
        also_train=("lm_head",),
        kl_weight=2.0,
        save_every=1,
    )

    def run(name: str, settings: TrainSettings, **more: object) -> list[float]:
        train(model, tmp_path / "archive", [rows], tmp_path / name, settings, **more)  # type: ignore[arg-type]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["kl"] for line in lines]

    whole = run("whole", settings)
    assert whole[0] == pytest.approx(0, abs=1e-6)
    polls = iter([0, 0, 15])
    with pytest.raises(Stopped):
        run("halves", settings, stop=lambda: next(polls))
    assert run("halves", settings, resume=True) == whole
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    weak, strong = (run(f"{weight}", replace(settings, kl_weight=weight)) for weight in (1e-9, 20.0))
    assert strong[-1] < whole[-1] < weak[-1]
    plain = copy.deepcopy(replace(settings, kl_weight=None))
    train(model, tmp_path / "archive", [rows], tmp_path / "plain", plain)
    same = load_file(tmp_path / "plain" / "model.safetensors")
    torch.testing.assert_close(same, load_file(tmp_path / "1e-09" / "model.safetensors"), rtol=1e-3, atol=1e-4)
    with pytest.raises(SettingsError, match="--kl-weight"):
        run("streamed", replace(settings, offload="cpu"))
    assert not (tmp_path / "streamed").exists()
