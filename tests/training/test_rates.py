"""Learning rates relative to the size of what they change, against the formula by hand and against what training does."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from methods.toys import rotation
from safetensors.torch import load_file, save_file
from torch import Tensor

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, parameter_groups, protect, train
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.training.protect import protected_matrices
from sculptor.training.rates import default_relative_rate, matrix_scales, median_rms, peak_rates
from sculptor.training.setup import prepare_model
from sculptor.training.stepping.resident import ResidentUpdates

RULES = {"rotation-2": rotation.KIND}
ZERO = "model.layers.1.self_attn.o_proj.weight"
FIRST_STEP = TrainSettings(max_steps=1, warmup=0, clip=0, schedule="constant", batch_size=8, device="cpu")


def without_one(path: Path) -> Path:
    """Makes one matrix zero, in place."""
    tensors = load_file(path / "model.safetensors")
    tensors[ZERO] = torch.zeros_like(tensors[ZERO])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which one matrix is zero, and archives of it."""
    path = tmp_path_factory.mktemp("rates")
    without_one(save_checkpoint(path / "model"))
    rows = write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "model", path / "weights", AnalyzeSettings(preserve=0.5, device="cpu"))
    moments = AnalyzeSettings(basis="curvature", data=(str(rows),), exclude=("o_proj",), device="cpu")
    analyze(path / "model", path / "curvature", moments)
    analyze(path / "model", path / "rotation", AnalyzeSettings(rule="rotation-2", device="cpu"), rules=RULES)
    return path


def sizes(model: Path, archive: Archive) -> dict[str, float]:
    """RMS of every matrix, by hand."""
    tensors = load_file(model / "model.safetensors")
    return {name: float(tensors[name].double().square().mean().sqrt()) for name in archive}


@pytest.mark.parametrize(("basis", "c"), [("weights", 0.1), ("curvature", 0.2)])
def test_the_default_is_the_formula(made: Path, basis: str, c: float) -> None:
    archive = Archive(made / basis)
    free = total = 0
    sides = []
    for record in archive.values():
        m, n = record.shape
        total += m * n
        free += sum(math.prod(shape) for shape in record.rule.shapes)
        sides.append(min(m, n))
    expected = c / math.sqrt(free / total * statistics.median(sides) * 2)  # two blocks
    assert default_relative_rate(archive) == pytest.approx(expected, rel=1e-12)


def test_what_is_half_free_has_half_the_squared_step(made: Path, tmp_path: Path) -> None:
    found = []
    for preserve in (0.0, 0.5):
        settings = AnalyzeSettings(preserve=preserve, constraint="input", device="cpu")
        analyze(made / "model", tmp_path / str(preserve), settings)
        archive = Archive(tmp_path / str(preserve))
        found.append((default_relative_rate(archive), archive.num_free))
    (whole, free), (half, less) = found
    assert half**2 * less == pytest.approx(whole**2 * free, rel=1e-12)


def test_a_rule_of_few_coordinates_is_no_reason_for_any_rate(made: Path, tmp_path: Path) -> None:
    analyze(made / "model", tmp_path / "mask", AnalyzeSettings(rule="mask", free=0.002, device="cpu"))
    archive = Archive(tmp_path / "mask")
    entries = sum(math.prod(record.shape) for record in archive.values())
    width = statistics.median(min(record.shape) for record in archive.values())
    assert 0 < archive.num_free / entries < 0.01
    c = archive.method.defaults.rate
    assert default_relative_rate(archive) == pytest.approx(c / math.sqrt(0.01 * width * 2))


def test_what_share_angles_are_of_the_entries_says_nothing(made: Path) -> None:
    archive = Archive(made / "rotation", rules=RULES)
    width = statistics.median(min(record.shape) for record in archive.values())
    assert default_relative_rate(archive) == pytest.approx(1.6 / math.sqrt(width * 2))


def test_a_matrix_is_scaled_by_its_rms_and_one_of_zeros_by_a_tenth_of_the_median(made: Path) -> None:
    archive = Archive(made / "weights")
    rms = sizes(made / "model", archive)
    median = statistics.median(rms.values())
    assert rms[ZERO] == 0 < median
    assert median_rms(archive) == pytest.approx(median)
    found = matrix_scales(archive)
    assert found.keys() == set(archive)
    for name, scale in found.items():
        assert scale == pytest.approx(0.1 * median if name == ZERO else rms[name])


def test_angles_have_no_scale(made: Path, tmp_path: Path) -> None:
    archive = Archive(made / "rotation", rules=RULES)
    assert matrix_scales(archive) == dict.fromkeys(archive, 1.0)
    settings = replace(FIRST_STEP, relative_rate=0.01)
    train(made / "model", made / "rotation", [made / "rows.jsonl"], tmp_path / "out", settings, rules=RULES)
    before, after = load_file(made / "model" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = next(iter(archive))
    w, new = before[name].double(), after[name].double()
    even, odd = w[0::2], w[1::2]
    angles = torch.atan2((even * new[1::2] - odd * new[0::2]).sum(1), (even * new[0::2] + odd * new[1::2]).sum(1))
    torch.testing.assert_close(angles.abs(), torch.full_like(angles, 0.01), rtol=1e-2, atol=1e-6)


def test_an_absolute_rate_is_the_same_for_everything(made: Path) -> None:
    archive = Archive(made / "weights")
    peaks = peak_rates(TrainSettings(learning_rate=3e-3), archive, {"norm": torch.ones(4)})
    assert peaks.matrices == dict.fromkeys(archive, 3e-3)
    assert peaks.extra == {"norm": 3e-3}


def test_openly_trained_parameters_have_the_same_relative_rate(made: Path) -> None:
    archive = Archive(made / "weights")
    median = statistics.median(sizes(made / "model", archive).values())
    extra: Mapping[str, Tensor] = {
        "norm": torch.full((8,), 1.0),
        "bias of zeros": torch.zeros(8),
        "small bias": torch.full((8,), 0.5 * median),
        "embedding": torch.full((8, 4), -3.0),
        "small matrix": torch.full((8, 4), 0.5 * median),
        "matrix of zeros": torch.zeros(8, 4),
    }
    peaks = peak_rates(TrainSettings(relative_rate=0.02), archive, extra)
    expected = [max(1.0, median), median, median, 3.0, 0.5 * median, 0.1 * median]
    assert list(peaks.extra) == list(extra)
    assert list(peaks.extra.values()) == pytest.approx([0.02 * scale for scale in expected])
    for name, scale in matrix_scales(archive).items():
        assert peaks.matrices[name] == pytest.approx(0.02 * scale)


def test_a_matrix_of_zeros_learns(made: Path, tmp_path: Path) -> None:
    report = train(made / "model", made / "weights", [made / "rows.jsonl"], tmp_path / "out", FIRST_STEP)
    after = load_file(tmp_path / "out" / "model.safetensors")
    archive = Archive(made / "weights")
    median = statistics.median(sizes(made / "model", archive).values())
    free = sum(math.prod(shape) for shape in archive[ZERO].rule.shapes)
    assert report.relative_rate is not None
    # AdamW's first step is the rate in every coordinate, and ||dW|| = ||A||.
    expected = report.relative_rate * 0.1 * median * math.sqrt(free)
    assert float(after[ZERO].double().norm()) == pytest.approx(expected, rel=1e-2)


def updates_of(model: Any) -> dict[str, float]:
    """||dW|| of every matrix of a protected model."""
    return {
        matrix.coordinates.name: float(torch.cat([a.detach().flatten() for a in matrix.coordinates.values]).norm())
        for matrix in protected_matrices(model)
    }


@pytest.mark.parametrize("given", [None, 0.004])
def test_groups_for_a_loop_of_ones_own_take_the_steps_of_train(made: Path, given: float | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = replace(FIRST_STEP, relative_rate=given)
    report = train(made / "model", made / "weights", [made / "rows.jsonl"], tmp_path / "out", settings)
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    archive = Archive(made / "weights")
    protect(model, archive)
    groups = parameter_groups(model, relative_rate=given)
    assert len(groups) == len(archive)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    ids = torch.arange(4, 40).view(4, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    found = updates_of(model)
    assert found.keys() == report.matrices.keys()
    for name, matrix in report.matrices.items():
        assert found[name] == pytest.approx(matrix.update_norm, rel=2e-2), name


def test_groups_name_every_coordinate_once(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "model")
    protect(model, made / "weights")
    listed = [id(value) for group in parameter_groups(model) for value in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rates = [group["lr"] for group in parameter_groups(model, relative_rate=1.0)]
    assert rates == pytest.approx(list(matrix_scales(Archive(made / "weights")).values()))


def test_the_optimizer_of_train_has_these_rates(made: Path, tmp_path: Path) -> None:
    from sculptor.checkpoint.architecture import inspect_architecture
    from sculptor.progress import silent

    checkpoint, archive = open_checkpoint(made / "model"), Archive(made / "weights")
    settings = TrainSettings(relative_rate=0.01, offload="none", soften=0.0, device="cpu")
    extra = ["lm_head.weight", "model.norm.weight"]
    architecture = inspect_architecture(checkpoint)
    _, updates = prepare_model(
        checkpoint, architecture, archive, settings, extra, torch.device("cpu"), tmp_path / "scratch", silent
    )
    assert isinstance(updates, ResidentUpdates)
    names = {id(value): name for name, value in updates.trainable.named().items()}
    found = {names[id(p)]: group["peak"] for group in updates.optimizer.param_groups for p in group["params"]}
    peaks = peak_rates(settings, archive, updates.extra)
    assert found == {f"{name}.A0": rate for name, rate in peaks.matrices.items()} | dict(peaks.extra)
    updates.close()
