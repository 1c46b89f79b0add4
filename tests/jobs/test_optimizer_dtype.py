"""`train --optimizer-dtype bfloat16`: the same run wherever blocks wait and however often it is halted, for fewer bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, Archive, EstimateSettings, TrainSettings, analyze, estimate, train, verify
from sculptor.errors import OutputError, Stopped
from sculptor.training.state import STATE_NAME

NARROW: dict[str, Any] = {
    "max_steps": 6, "batch_size": 4, "learning_rate": 3e-3, "device": "cpu", "carry": "keep", "save_every": 2,
    "optimizer_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", dtype=torch.float32)
    write_rows(tmp_path / "rows.jsonl", task_rows(count=10))
    analyze(tmp_path / "model", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return tmp_path


def run(place: Path, name: str, changes: dict[str, Any], **options: Any) -> Any:
    settings = TrainSettings(**NARROW | changes)
    return train(place / "model", place / "archive", [place / "rows.jsonl"], place / name, settings, **options)


def tensors(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / name / "model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "bayes-adam"])
def test_it_is_the_same_training_wherever_blocks_wait(place: Path, optimizer: str) -> None:
    told = {"optimizer": optimizer, "also_train": ("norm",)}
    resident = run(place, "none", told | {"offload": "none"})
    ways: dict[str, dict[str, Any]] = {offload: {"offload": offload} for offload in ("bases", "cpu", "disk")}
    if optimizer == "adamw":
        ways["host"] = {"offload": "cpu", "optimizer_on": "host"}
    base, expected = tensors(place, "model"), tensors(place, "none")
    assert resident.loop.last_loss < resident.loop.first_loss
    for name, changes in ways.items():
        run(place, name, told | changes)
        found = tensors(place, name)
        for key, value in expected.items():
            change = (value - base[key]).norm()
            # Rounding of gradients may tip that of a moment.
            assert (found[key] - value).norm() <= 1e-3 * change + 1e-6 * base[key].norm(), (name, key)
        assert verify(place / "model", place / name, place / "archive", device="cpu").passed
    run(place, "wide", told | {"offload": "none", "optimizer_dtype": "float32"})
    wide = tensors(place, "wide")
    apart = [float((wide[key] - value).norm() / (wide[key] - base[key]).norm()) for key, value in expected.items()
             if not torch.equal(wide[key], base[key])]  # fmt: skip
    assert 0 < max(apart) < 0.05, "it is a training as with moments in float32, to what rounding does"


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_it_goes_on_bit_for_bit(place: Path, offload: str) -> None:
    told = {"offload": offload}
    run(place, "whole", told)
    calls = iter((None, None, None, 15))
    with pytest.raises(Stopped):
        run(place, "halted", told, stop=lambda: next(calls))
    (state,) = (place / "halted.partial" / STATE_NAME).glob("step-*")
    kept = {name: value for path in state.glob("*.safetensors") for name, value in load_file(path).items()}
    moments = {value.dtype for name, value in kept.items() if ".exp_avg" in name}
    assert moments == {torch.bfloat16}
    with pytest.raises(OutputError, match="optimizer_dtype"):
        run(place, "halted", told | {"optimizer_dtype": "float32"}, resume=True)
    run(place, "halted", told, resume=True)
    whole, halted = (sorted((place / name).glob("*.safetensors")) for name in ("whole", "halted"))
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in halted]
    record = json.loads((place / "whole" / "sculptor.json").read_text())
    assert record["settings"]["optimizer_dtype"] == "bfloat16"


@pytest.mark.parametrize("mode", ["none", "cpu", "disk"])
def test_an_estimate_counts_what_it_saves(place: Path, mode: str) -> None:
    told = {"tflops": 1, "disk": 1, "device": "cpu"}
    plans = []
    for dtype in ("float32", "bfloat16"):
        settings = EstimateSettings(**told, optimizer_dtype=dtype)
        plans.append(estimate(place / "model", settings, subspaces=place / "archive").modes[mode].plan)
    wide, narrow = plans
    part = {"none": "device", "cpu": "host", "disk": "disk"}[mode]
    name = "coordinates, gradients, AdamW"
    saved = 4 * Archive(place / "archive").num_free
    assert getattr(wide, part)[name] - getattr(narrow, part)[name] == saved
    assert wide.loaded - narrow.loaded == (saved if mode != "none" else 0)


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_what_earlier_tasks_made_sure_goes_along(place: Path, offload: str) -> None:
    """A second task of bayes-adam begins with averages of 0 and precisions as they were, in float32."""
    told = {"optimizer": "bayes-adam", "evidence": 0.3, "offload": offload}
    shutil.rmtree(place / "archive")
    curvature = AnalyzeSettings(
        basis="curvature", data=(str(place / "rows.jsonl"),), device="cpu"
    )  # several coordinates a matrix
    analyze(place / "model", place / "archive", curvature)
    run(place, "first", told)
    settings = TrainSettings(**NARROW | told)
    rows, archive = [place / "rows.jsonl"], place / "first" / "subspaces"
    report = train(place / "first", archive, rows, place / "second", settings)
    assert report.loop.last_loss < report.loop.first_loss
    before, after = (load_file(path / "optimizer.safetensors") for path in (archive, place / "second" / "subspaces"))
    grown = {name for name, value in before.items() if name.endswith(".precision") and (after[name] >= value).all()}
    assert grown == {name for name in before if name.endswith(".precision")}
    assert {before[name].dtype for name in grown} == {torch.float32}
