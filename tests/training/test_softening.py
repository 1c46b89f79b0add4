"""Softened coordinates: slower where curvature is large, still exact in the free space."""

from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from transformers import AutoModelForCausalLM

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, protect, train, verify
from sculptor.errors import OutputError, SettingsError, Stopped
from sculptor.methods.rule import Working
from sculptor.numerics.free_space import FreeSpace
from sculptor.numerics.staircase import Staircase
from sculptor.training.protect import attach_coordinates, protected_matrices


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its moments archive and rows."""
    path = tmp_path_factory.mktemp("soft")
    save_checkpoint(path / "model")
    rows = write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "model", path / "archive", AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu"))
    return path


def test_the_factor_is_one_over_the_root_of_one_plus_importance(made: Path) -> None:
    archive = Archive(made / "archive")
    name = next(iter(archive))
    entry = archive.read(name)
    rule = entry.rule
    output, input = rule.factors(entry.tensors)  # type: ignore[attr-defined]
    assert output is not None
    g, c = output.spectrum(), input.spectrum()
    prepared = rule.prepare(entry.tensors, Working(torch.device("cpu"), torch.float32, 2.0)).tensors
    h, w = prepared["soft_outputs"], prepared["soft_inputs"]
    staircase = rule.staircase  # type: ignore[attr-defined]
    first = next(group for group in staircase.groups if group.reach < rule.shape[1]).start
    least = staircase.groups[-1].reach
    expected = 2.0 * torch.outer(g, c)[first:, least:] / (g.mean() * c.mean())
    torch.testing.assert_close(torch.outer(h, w).double(), expected, rtol=1e-5, atol=1e-7)


def test_fold_and_project_are_adjoint_and_scaled(generator: torch.Generator) -> None:
    staircase = Staircase(4, 5, ((2, 5), (4, 1)))
    plain = FreeSpace(Staircase(4, 5, ((4, 0),)), None, None)
    assert plain.shapes == ((4, 5),)
    h, w = torch.rand(4, generator=generator).double(), torch.rand(5, generator=generator).double()
    soft = FreeSpace(Staircase(4, 5, ((4, 0),)), None, None, (h, w))
    a = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(soft.fold([a]), a / (1 + torch.outer(h, w)).sqrt())
    gradient = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    assert float((soft.fold([a]) * gradient).sum()) == pytest.approx(float((a * soft.project(gradient)[0]).sum()))
    assert staircase.num_free == 8


def test_softened_training_keeps_the_constraint_and_touches_less_curvature(made: Path, tmp_path: Path) -> None:
    kept = {}
    for soften in (0.0, 30.0):
        out = tmp_path / f"{soften:g}"
        settings = TrainSettings(max_steps=6, learning_rate=5e-3, soften=soften, device="cpu")
        train(made / "model", made / "archive", [made / "rows.jsonl"], out, settings)
        found = verify(made / "model", out, made / "archive", device="cpu")
        assert found.passed
        assert found.leak < 1e-5
        kept[soften] = found.kept
    assert kept[30.0] is not None
    assert kept[0.0] is not None
    assert kept[30.0] > kept[0.0]


def test_protect_softens_as_train_does_unless_told(made: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    analyze(made / "model", plain, AnalyzeSettings(basis="weights", preserve=0.5))
    for archive, told, expected in (
        (made / "archive", {}, 3.0),
        (made / "archive", {"soften": 0.0}, 0.0),
        (plain, {}, 0.0),
    ):
        model = protect(AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32), archive, **told)
        assert {matrix.coordinates.soften for matrix in protected_matrices(model)} == {expected}


def test_without_moments_it_is_refused(made: Path, tmp_path: Path) -> None:
    analyze(made / "model", tmp_path / "weights", AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = TrainSettings(max_steps=1, soften=1.0, device="cpu")
    with pytest.raises(SettingsError, match=r"--soften without effect.*--basis inputs or curvature"):
        train(made / "model", tmp_path / "weights", [made / "rows.jsonl"], tmp_path / "out", settings)


def test_nothing_of_the_size_of_a_matrix_is_held_for_it(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    attach_coordinates(model, Archive(made / "archive"), soften=3.0)
    for matrix in protected_matrices(model):
        m, n = matrix.coordinates.rule.shape
        soft = [b for name, b in matrix.coordinates.named_buffers() if name.startswith("soft_")]
        assert sum(b.numel() for b in soft) <= m + n


def test_a_matrix_without_curvature_is_not_slowed_down(tmp_path: Path) -> None:
    """Behind a projection of zeros (as in block expansion) no gradient comes back."""
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(tmp_path / "made"))
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "made")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(tmp_path / "made", tmp_path / "a", AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu"))
    report = train(
        tmp_path / "made", tmp_path / "a", [rows], tmp_path / "out", TrainSettings(max_steps=3, device="cpu")
    )
    assert report.loop.last_loss < report.loop.first_loss


def test_a_state_of_another_budget_is_not_taken_up(made: Path, tmp_path: Path) -> None:
    """Archives under two budgets share their tensors and differ in their steps."""
    rows = str(made / "rows.jsonl")
    analyze(made / "model", tmp_path / "b", AnalyzeSettings(basis="curvature", data=(rows,), budget=0.8, device="cpu"))
    settings = TrainSettings(max_steps=4, save_every=1, device="cpu")
    with pytest.raises(Stopped):
        train(made / "model", made / "archive", [rows], tmp_path / "out", settings, stop=lambda: 15)
    with pytest.raises(OutputError, match=r"other settings .*subspaces"):
        train(made / "model", tmp_path / "b", [rows], tmp_path / "out", settings, resume=True)
