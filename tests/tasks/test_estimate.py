"""Estimates: arithmetic that matches what is built, and a choice that says why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, Result, save_checkpoint, task_rows, write_rows

import sculptor
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import SettingsError
from sculptor.model.load import load_streamed
from sculptor.tasks import placement
from sculptor.tasks.placement import archive_shapes, choose
from sculptor.training.footprint import Workload, footprints
from sculptor.training.streamed import StreamedUpdates

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_bytes_that_wait_are_those_of_the_regions(tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path / "model", family)
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    checkpoint, archive = open_checkpoint(tmp_path / "model"), sculptor.Archive(tmp_path / "archive")
    architecture = inspect_architecture(checkpoint)
    found = footprints(checkpoint, architecture, archive_shapes(archive, architecture), CPU, Workload(8, 1))["cpu"]
    loaded = load_streamed(checkpoint, CPU, "cpu", architecture)
    assert loaded.stream is not None
    updates = StreamedUpdates(
        loaded.model, loaded.stream, archive, {}, sculptor.TrainSettings(learning_rate=1e-3, soften=0.0)
    )
    blocks = updates.blocks.values()
    states = sum(block.state_layout.num_bytes + block.gradient_layout.num_bytes for block in blocks)
    bases = sum(block.bases_layout.num_bytes for block in blocks)
    weights = sum(layout.num_bytes for layout in loaded.stream.layouts)
    # Alignment adds to tiny matrices.
    assert found.host["coordinates, gradients, AdamW"] == pytest.approx(states, rel=0.1)
    assert found.host["bases"] == pytest.approx(bases, rel=0.1)
    assert found.host["weights"] == pytest.approx(weights, rel=0.1)
    updates.close()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_estimated(cli: Callable[..., Result], tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path / "model", family)
    found = cli("estimate", tmp_path / "model", "--tflops", 1, "--disk", 1, "--json")
    assert found.code == 0, found.err
    assert set(found.json["modes"]) == {"none", "cpu", "disk"}
    assert found.json["chosen"] == "none"


def test_the_table_fits_and_gives_a_verdict(cli: Callable[..., Result], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    found = cli("estimate", tmp_path / "model", "--subspaces", tmp_path / "archive", "--directory", tmp_path)
    assert found.code == 0, found.err
    assert max(map(len, found.out.splitlines())) <= 100 + len(str(tmp_path))
    assert "Verdict: --offload auto picks none" in found.out
    tight = cli("estimate", tmp_path / "model", "--gpu-memory", 1e-6, "--host-memory", 1e-6, "--disk", 1)
    assert tight.code == 0
    assert "Verdict: does not fit here" in tight.out


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--preserve", "1"], "--preserve"), (["--tflops", "0"], "--tflops"), (["--batch-size", "-1"], "--batch-size")],
)
def test_bad_settings_are_named(cli: Callable[..., Result], tmp_path: Path, options: list[str], named: str) -> None:
    save_checkpoint(tmp_path / "model")
    found = cli("estimate", tmp_path / "model", *options)
    assert found.code == 2
    assert named in found.err


def test_auto_takes_what_fits_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    architecture = inspect_architecture(checkpoint)
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    shapes = archive_shapes(sculptor.Archive(tmp_path / "archive"), architecture)
    gpu = torch.device("cuda")
    found = footprints(checkpoint, architecture, shapes, gpu, Workload(64, 1))
    larger = replace(found["none"], device={"weights": 1e11}, host={})
    roomy = replace(found["cpu"], device={"blocks": 1e9}, host={"weights": 5e10})
    plans = found | {"none": larger, "cpu": roomy}
    for free, expected in (((2e11, 2e11), "none"), ((8e10, 2e11), "cpu"), ((8e10, 4e10), "disk")):
        monkeypatch.setattr(placement, "available_memory", lambda _, free=free: free)
        plan, reason = choose(plans, gpu, "auto", tmp_path)
        assert plan.offload == expected
        assert reason.startswith(f"--offload auto picks {expected}: ")
        assert ("none needs 100.0 GB of GPU memory, 80.0 GB are free" in reason) == (expected != "none")
    monkeypatch.setattr(placement, "available_memory", lambda _: (0.0, 0.0))
    with pytest.raises(SettingsError, match=r"--offload auto: does not fit: none needs .* MB are free.*disk needs"):
        choose(found, gpu, "auto", tmp_path)
    with pytest.raises(SettingsError, match="--offload cpu: does not fit"):
        choose(found, gpu, "cpu", tmp_path)
    monkeypatch.setattr(placement, "available_memory", lambda _: (2e11, 2e11))
    monkeypatch.setattr(placement, "available_disk", lambda _: 1e9)
    filled = {name: replace(plan, disk={"output and archive": 2e9}) for name, plan in found.items()}
    with pytest.raises(SettingsError, match=r"2.0 GB of disk, 1.0 GB are free; free some space or choose another"):
        choose(filled, gpu, "auto", tmp_path)


def test_training_says_what_auto_picked(cli: Callable[..., Result], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    arguments = ("train", tmp_path / "model", "--subspaces", tmp_path / "archive", "--data", rows, "--max-steps", 1)
    found = cli(*arguments, "--output", tmp_path / "tuned")
    assert found.code == 0, found.err
    assert "--offload auto picks none: everything fits." in found.out
    assert found.err == ""
    idle = ("--keep-inputs", "--optimizer-on", "device", "--checkpoint-activations")  # what is done anyway
    found = cli(*arguments, "--output", tmp_path / "second", "--optimizer-on", "host", "--offload-inputs")
    assert found.code == 0, found.err
    assert "picks none: everything fits; without effect there: --optimizer-on, --offload-inputs" in found.err
    found = cli(*arguments, "--output", tmp_path / "third", *idle)
    assert (found.code, found.err) == (0, "")


def test_an_archive_of_another_model_is_refused(cli: Callable[..., Result], tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        save_checkpoint(tmp_path / family, family)
    sculptor.analyze(tmp_path / "gpt2", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    found = cli("estimate", tmp_path / "llama", "--subspaces", tmp_path / "archive")
    assert found.code == 1
    assert "run `sculptor analyze` on this checkpoint" in found.err


def test_what_does_not_fit_is_refused_before_anything_starts(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    monkeypatch.setattr(placement, "available_memory", lambda _: (1e6, 1e6))
    arguments = ("train", tmp_path / "model", "--subspaces", tmp_path / "archive", "--data", rows, "--max-steps", 1)
    found = cli(*arguments, "--output", tmp_path / "tuned", "--offload", "cpu")
    assert found.code == 2
    assert "--offload cpu: does not fit" in found.err
    assert not list(tmp_path.glob("tuned*"))


def test_what_a_run_leaves_on_disk_is_planned(cli: Callable[..., Result], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    arguments = ("--subspaces", tmp_path / "archive")
    planned = cli("estimate", tmp_path / "model", *arguments, "--tflops", 1, "--json").json["modes"]["none"]["plan"]
    options = ("--data", rows, "--output", tmp_path / "tuned", "--max-steps", 3, "--save-every", 1, "--offload", "none")
    assert cli("train", tmp_path / "model", *arguments, *options).code == 0
    written = sum(file.stat().st_size for file in (tmp_path / "tuned").rglob("*.safetensors"))
    assert planned["disk"]["output and archive"] == pytest.approx(written, rel=0.2)
    free = sum(record.staircase.num_free for record in sculptor.Archive(tmp_path / "archive").values())
    assert planned["disk"]["saved states"] == 24 * free


def test_parameters_trained_openly_are_planned(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    architecture = inspect_architecture(checkpoint)
    without, extra = (
        footprints(checkpoint, architecture, (), torch.device("cuda"), Workload(64, 1, num_extra=n)) for n in (0, 1000)
    )
    size = next(iter(checkpoint.infos.values())).dtype.itemsize
    for name in without:
        assert sum(extra[name].device.values()) - sum(without[name].device.values()) == (16 - size) * 1000
