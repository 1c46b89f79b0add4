"""Estimates: arithmetic that matches what is built, and a choice that says why."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, Result, save_checkpoint, task_rows, write_rows

import sculptor
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import SettingsError
from sculptor.jobs import plan as deciding
from sculptor.model.load import load_streamed
from sculptor.planning import placement, speeds
from sculptor.planning.footprints import Footprint, Workload, footprints
from sculptor.planning.placement import choose, plan_archive
from sculptor.planning.settings import EstimateSettings
from sculptor.tasks import estimate, train
from sculptor.training import state
from sculptor.training.rates import Peaks
from sculptor.training.stepping.streamed import StreamedUpdates

COVERS = ["sculptor.planning.settings", "sculptor.planning.shares", "sculptor.report.estimate"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_bytes_that_wait_are_those_of_the_regions(tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path / "model", family)
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    checkpoint, archive = open_checkpoint(tmp_path / "model"), sculptor.Archive(tmp_path / "archive")
    architecture = inspect_architecture(checkpoint)
    found = footprints(checkpoint, architecture, plan_archive(archive, architecture), CPU, Workload(8, 1))["cpu"]
    loaded = load_streamed(checkpoint, CPU, "cpu", architecture)
    assert loaded.stream is not None
    updates = StreamedUpdates(
        loaded.model,
        loaded.stream,
        archive,
        {},
        Peaks(dict.fromkeys(archive, 1e-3), {}),
        sculptor.TrainSettings(learning_rate=1e-3, soften=0.0),
    )
    blocks = updates.blocks.values()
    states = sum(block.state_layout.num_bytes + block.gradient_layout.num_bytes for block in blocks)
    bases = sum(block.bases_layout.num_bytes for block in blocks)
    weights = sum(layout.num_bytes for layout in loaded.stream.waiting.layouts)
    # Alignment adds to tiny matrices.
    assert found.host["coordinates, gradients, AdamW"] == pytest.approx(states, rel=0.1)
    assert found.host["bases"] == pytest.approx(bases, rel=0.1)
    assert found.host["weights"] == pytest.approx(weights, rel=0.1)
    updates.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_estimated(cli: Callable[..., Result], tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path / "model", family)
    found = cli("estimate", tmp_path / "model", "--tflops", 1, "--disk", 1, "--json")
    assert found.code == 0, found.err
    assert set(found.json["modes"]) == {"none", "cpu", "bases", "disk"}
    assert found.json["chosen"] == "none"


def test_the_table_fits_and_gives_a_verdict(cli: Callable[..., Result], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    found = cli("estimate", tmp_path / "model", "--subspaces", tmp_path / "archive", "--directory", tmp_path)
    assert found.code == 0, found.err
    assert max(map(len, found.out.splitlines())) <= 100 + len(str(tmp_path))
    assert "Verdict: --offload auto picks none" in found.out
    tight = cli("estimate", tmp_path / "model", "--gpu-memory", 1e-6, "--host-memory", 1e-6, "--disk", 1)
    assert tight.code == 1
    assert "Verdict: does not fit here; free memory or use a larger machine." in tight.out
    rows = ("--batch-size", 10**7, "--micro-batch-size", 10**7)
    large = cli("estimate", tmp_path / "model", "--gpu-memory", 2, "--disk", 1, *rows)
    assert large.code == 1
    assert "Verdict: does not fit here; lower --micro-batch-size or --max-length." in large.out


def test_data_tell_the_longest_row_and_an_epoch(cli: Callable[..., Result], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "w1 w2 w3"}, {"text": "w1 " * 20}, {"text": "w2 " * 10}])
    arguments = ("estimate", tmp_path / "model", "--data", rows, "--batch-size", 2, "--tflops", 1, "--disk", 1)
    found = cli(*arguments, "--json").json
    longest = found["data"]["longest"]
    assert longest < 30
    assert (found["data"]["num_examples"], found["steps"]) == (3, 2)
    assert found["tokens"] == round(2 * found["data"]["num_tokens"] / 3) < 2 * longest
    same = cli(
        "estimate", tmp_path / "model", "--max-length", longest, "--batch-size", 2, "--tflops", 1, "--disk", 1, "--json"
    )
    for name, mode in found["modes"].items():  # memory is for the longest, time for the average
        assert mode["plan"] == same.json["modes"][name]["plan"]
        assert mode["compute"] < same.json["modes"][name]["compute"]
    text = cli(*arguments).out
    assert f"3 examples of up to {longest} tokens: 2 steps per epoch, by default 10 in all." in text
    assert (found["steps"], found["total"]) == (2, 10)
    shown = cli("data", rows, "--model", tmp_path / "model", "--rows", 1).out
    assert shown in text  # what the first row becomes, and the sums
    assert "epoch, about" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--preserve", "1"], "--preserve"),
        (["--rank", "4"], "--rank without effect with --rule staircase; --rank goes with lowrank"),
        (["--rule", "mask", "--constraint", "core"], "--constraint without effect with --rule mask"),
        (["--tflops", "0"], "--tflops"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--fused", "--micro-batch-size", "4"], "--micro-batch-size"),
    ],
)
def test_bad_settings_are_named(cli: Callable[..., Result], tmp_path: Path, options: list[str], named: str) -> None:
    save_checkpoint(tmp_path / "model")
    found = cli("estimate", tmp_path / "model", *options)
    assert found.code == (1 if "--data" in options else 2)
    assert named in found.err


def test_memory_is_for_the_fullest_micro_batch(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")

    def activations(batch: int) -> Any:
        settings = EstimateSettings(batch_size=batch, micro_batch_size=8, tflops=1, disk=1)
        return estimate.estimate(tmp_path / "model", settings).modes["none"].plan.device["activations"]

    assert activations(8) == activations(9) > activations(5)


def test_a_row_and_a_router_s_batch_are_not_split(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", "mixtral"))
    architecture = inspect_architecture(checkpoint)

    def activations(row: int) -> float:
        work = Workload(2**16, 1, row=row)
        return footprints(checkpoint, architecture, (), torch.device("cuda"), work)["cpu"].device["activations"]

    short, long = activations(512), activations(2**15)
    assert activations(8192) == short < long < activations(2**16)
    checkpoint.config["output_router_logits"] = True
    assert activations(512) == activations(2**16)


def test_auto_takes_what_fits_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    architecture = inspect_architecture(checkpoint)
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    shapes = plan_archive(sculptor.Archive(tmp_path / "archive"), architecture)
    gpu = torch.device("cuda")
    found = footprints(checkpoint, architecture, shapes, gpu, Workload(64, 1))
    larger = replace(found["none"], device={"weights": 1e11}, host={})
    roomy = replace(found["cpu"], device={"blocks": 1e9}, host={"weights": 5e10})
    plans = found | {"none": larger, "cpu": roomy}
    apart = replace(found["bases"], device={"weights, waiting": 7e10}, host={"bases": 3e10})
    plans |= {"bases": apart}
    cases = (
        ((2e11, 2e11), "none"),
        ((8e10, 2e11), "cpu"),
        ((8e10, 4e10), "bases"),
        ((6e10, 4e10), "disk"),
    )
    for free, expected in cases:
        monkeypatch.setattr(placement, "available_memory", lambda _, free=free: free)
        plan, reason = choose(plans, gpu, "auto", tmp_path)
        assert plan.offload == expected
        assert reason.startswith(f"--offload auto picks {expected}: ")
        assert (f"none needs 100.0 GB of GPU memory ({free[0] / 1e9:.1f} GB free)" in reason) == (expected != "none")
    monkeypatch.setattr(placement, "available_memory", lambda _: (0.0, 0.0))
    with pytest.raises(SettingsError, match=r"--offload auto: does not fit: none needs .* MB free.*disk needs"):
        choose(found, gpu, "auto", tmp_path)
    with pytest.raises(SettingsError, match="--offload cpu: does not fit"):
        choose(found, gpu, "cpu", tmp_path)
    monkeypatch.setattr(placement, "available_memory", lambda _: (2e11, 2e11))
    monkeypatch.setattr(placement, "available_disk", lambda _: 1e9)
    filled = {name: replace(plan, disk={"output and archive": 2e9}) for name, plan in found.items()}
    with pytest.raises(SettingsError, match=r"2.0 GB of disk \(1.0 GB free\); free some space or choose another"):
        choose(filled, gpu, "auto", tmp_path)


def prepared(tmp_path: Path) -> tuple[object, ...]:
    """A model, its archive and a task, and the command that trains a step; the output is for the caller to say."""
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    return ("train", tmp_path / "model", "--subspaces", tmp_path / "archive", "--data", rows, "--max-steps", 1)


def test_training_says_what_auto_picked(cli: Callable[..., Result], tmp_path: Path) -> None:
    arguments = prepared(tmp_path)
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


def test_asking_for_too_little_memory_is_done_with_a_warning(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = prepared(tmp_path)
    quiet = cli(*arguments, "--offload", "none", "--output", tmp_path / "first")
    assert (quiet.code, quiet.err) == (0, "")
    monkeypatch.setattr(placement, "available_memory", lambda _: (2e8, 2e8))
    found = cli(*arguments, "--offload", "none", "--output", tmp_path / "second")
    assert found.code == 0
    assert "--offload none, as asked, though it may need 0.5 GB of memory (0.2 GB free)" in found.err


def test_an_archive_of_another_model_is_refused(cli: Callable[..., Result], tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        save_checkpoint(tmp_path / family, family)
    sculptor.analyze(tmp_path / "gpt2", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    clash = cli("estimate", tmp_path / "gpt2", "--subspaces", tmp_path / "archive", "--preserve", 0.9)
    assert clash.code == 2
    assert "--preserve without effect with --subspaces" in clash.err
    found = cli("estimate", tmp_path / "llama", "--subspaces", tmp_path / "archive")
    assert found.code == 1
    assert "run `sculptor analyze` on this checkpoint" in found.err


def test_what_does_not_fit_is_refused_before_anything_starts(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = prepared(tmp_path)
    monkeypatch.setattr(placement, "available_memory", lambda _: (1e6, 1e6))
    found = cli(*arguments, "--output", tmp_path / "tuned", "--offload", "cpu")
    assert found.code == 2
    assert "--offload cpu: does not fit" in found.err
    monkeypatch.setattr(placement, "available_disk", lambda _: 1e4)
    found = cli(*arguments, "--output", tmp_path / "tuned", "--offload", "none")  # activations are the user's affair
    assert found.code == 2
    assert "--offload none: does not fit: none needs 0.2 MB of disk (0.0 MB free); free some space" in found.err
    assert not list(tmp_path.glob("tuned*"))


def test_a_disk_that_cannot_be_measured_is_assumed(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model")

    def full(_: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speeds, "_measure_disk", full)
    found = cli("estimate", tmp_path / "model", "--tflops", 1, "--directory", tmp_path / "not" / "there")
    assert found.code == 0
    assert "2 GB/s disk (given or assumed)" in found.out
    assert not (tmp_path / "not").exists()


def test_computing_again_costs_a_forward_pass(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    architecture = inspect_architecture(checkpoint)
    kept, again = (
        footprints(checkpoint, architecture, (), CPU, Workload(64, 1, recompute=recompute))
        for recompute in (False, True)
    )
    assert 3 * again["none"].operations == 4 * kept["none"].operations
    assert again["cpu"].operations == kept["cpu"].operations == again["none"].operations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preserve", "changes"),
    [
        (0.1, {"save_every": 1}),  # the archive grows by a quarter of what is free
        (0.5, {"save_every": 3, "also_train": ("norm",)}),
        (0.0, {"save_every": 1, "save_dtype": "bfloat16"}),
        (0.5, {"save_every": 2, "carry": "retake"}),
    ],
)
@pytest.mark.parametrize("evaluates", [True, False])
def test_what_a_run_needs_of_the_disk_is_planned(
    tmp_path: Path, preserve: float, changes: dict[str, Any], evaluates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=preserve))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    taken: list[int] = []

    def measured(function: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def run(*arguments: Any, **more: Any) -> None:
            if after:
                function(*arguments, **more)
            taken.append(sum(file.stat().st_size for file in (tmp_path / "tuned.partial").rglob("*.safetensors")))
            if not after:
                function(*arguments, **more)

        return run

    monkeypatch.setattr(state, "write_tensors", measured(state.write_tensors, True))
    monkeypatch.setattr(train, "put_in_place", measured(train.put_in_place, False))
    plans: list[Footprint] = []
    monkeypatch.setattr(deciding, "choose", lambda found, *_, **__: plans.append(found["none"]) or (found["none"], ""))
    settings = sculptor.TrainSettings(max_steps=3, eval_every=1 if evaluates else None, **changes)
    output = tmp_path / "tuned"
    sculptor.train(
        tmp_path / "model", tmp_path / "archive", [rows], output, settings, eval_data=[rows] if evaluates else []
    )
    planned = sum(plans[0].disk.values())
    headers = 30_000  # of many small tensors, and random states
    assert max(taken) - headers <= planned <= 1.5 * max(taken)


@pytest.mark.parametrize("carry", ["accumulate", "retake"])
def test_an_archive_that_grows_is_planned(tmp_path: Path, carry: Any) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.1))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    settings = sculptor.TrainSettings(max_steps=3, learning_rate=1e-2, carry=carry)
    sculptor.train(tmp_path / "model", tmp_path / "archive", [rows], tmp_path / "tuned", settings)
    checkpoint, before = open_checkpoint(tmp_path / "model"), sculptor.Archive(tmp_path / "archive")
    after = sculptor.Archive(tmp_path / "tuned" / "subspaces")
    assert (after.num_bytes > 1.5 * before.num_bytes) == (carry == "accumulate")
    planned = placement.output_bytes(checkpoint, before, carry, None) - checkpoint.num_bytes
    assert after.num_bytes - 1000 <= planned <= 1.3 * after.num_bytes  # a header names more


@pytest.mark.parametrize("change", [{"also_train": ("norm",)}, {"optimizer_on": "host"}, {"optimizer_mode": "fused"}])
def test_settings_reach_the_plan(tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    found: list[Footprint] = []

    def stop(plans: dict[str, Footprint], *_: Any, **__: Any) -> None:
        found.append(plans["cpu"])
        raise InterruptedError

    monkeypatch.setattr(deciding, "choose", stop)
    for settings in ({}, change):
        whole = sculptor.TrainSettings(batch_size=2, clip_by="matrix", **settings)
        with pytest.raises(InterruptedError):
            sculptor.train(tmp_path / "model", tmp_path / "archive", [rows], tmp_path / "tuned", whole)
    before, after = found
    numbers = sculptor.Archive(tmp_path / "archive").num_free
    if "also_train" in change:
        assert sum(after.device.values()) - sum(before.device.values()) == 12 * 32  # the last norm
    elif "optimizer_on" in change:  # moments and gradients stay
        assert before.stored - after.stored == 12 * numbers
        assert before.loaded - after.loaded == 12 * numbers
    else:  # no gradients leave
        assert before.stored - after.stored == 4 * numbers


def test_several_gpus_divide_the_rows(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    options = ("--gpu-memory", 80, "--tflops", 400, "--link", 50, "--disk", 2, "--batch-size", 64, "--max-length", 64)
    one, four = (json.loads(cli("estimate", model, *options, "--gpus", n, "--json").out) for n in (1, 4))
    assert list(one["modes"]) == ["none", "cpu", "bases", "disk"]
    assert list(four["modes"]) == ["replicate", "shard", "shard, cpu", "shard, bases"]
    assert one["tokens"] == four["tokens"] == 64 * 64
    assert four["modes"]["replicate"]["compute"] == pytest.approx(one["modes"]["none"]["compute"] / 4, rel=0.2)
    replicate, shard, on_host, apart = (four["modes"][name]["plan"] for name in four["modes"])
    assert one["modes"]["none"]["plan"]["exchanged"] == 0
    assert replicate["exchanged"] == 1.5 * 4 * four["num_trainable"]
    blocks = sum(share["weights"] for share in shard["shares"])
    assert shard["exchanged"] == on_host["exchanged"]
    # Weights once, since both blocks are there where the pass turns round, and gradients with what narrows them.
    assert 0.75 * 1.5 * blocks < shard["exchanged"] <= 0.75 * 2 * blocks
    held = "coordinates, gradients, AdamW"
    assert sum(share["coordinates"] for share in shard["shares"]) == four["num_trainable"]
    assert replicate["device"][held] / 4 <= shard["device"][held] < replicate["device"][held] / 2
    assert on_host["host"][held] == shard["device"][held] == apart["device"][held]
    assert apart["host"]["bases"] == shard["device"]["bases"]
    assert apart["device"].keys() == shard["device"].keys() - {"bases", "pristine weights"}
    assert 0 == shard["loaded"] < apart["loaded"] < on_host["loaded"]
    text = cli("estimate", model, *options, "--gpus", 4).out
    assert "4 GPUs, each with its part of the rows and all matrices (replicate), or its share" in text
    assert "held by rank, divided" in text
    assert list(
        json.loads(cli("estimate", model, *options, "--gpus", 9, "--parallel", "shard", "--json").out)["modes"]
    ) == ["shard", "shard, cpu", "shard, bases"]
    assert cli("estimate", model, "--parallel", "shard").code == 2
    assert cli("estimate", model, "--gpus", 2, "--fused").code == 2


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_without_an_archive_it_plans_the_one_that_train_makes(
    cli: Callable[..., Result], tmp_path: Path, family: str
) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    settings = sculptor.AnalyzeSettings(data=(str(rows),), device="cpu")
    archive = sculptor.analyze(model, tmp_path / "archive", settings) and sculptor.Archive(tmp_path / "archive")
    told = EstimateSettings(tflops=1, disk=1, device="cpu")
    planned = sculptor.estimate(model, told)
    real = sculptor.estimate(model, told, subspaces=tmp_path / "archive")
    assert planned.basis == real.basis == "curvature"
    assert planned.num_trainable == pytest.approx(archive.num_free, rel=0.02)
    profiles = sum(
        torch.Size(stored.shape).numel() for name, stored in archive.manifest.tensors.items() if "profiles" in name
    )
    kept = sum(torch.Size(stored.shape).numel() for stored in archive.manifest.tensors.values()) - profiles
    assert planned.archive_bytes == 4 * kept
    assert planned.analysis_seconds == pytest.approx(real.analysis_seconds, rel=0.9), "of a measured speed"
    shown = [cli("estimate", model, "--tflops", 1, "--disk", 1, *more).out for more in ((), ("--preserve", 0.5))]
    assert "Archive (curvature): " in shown[0]
    assert "after the passes over text that it measures." in shown[0]
    assert "Archive (weights): " in shown[1]
    assert "decompositions to make it." in shown[1]
