"""A job in several processes is the job of one: same losses, same files, and every end is clean."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, IDS, SMALL, save_checkpoint, slowly, task_rows, write_rows
from safetensors.torch import load_file
from together import (
    Failed,
    analyze_on_a_small_disk,
    environment,
    free_port,
    held_bytes,
    on_a_small_disk,
    together,
    train_ahead,
    train_on,
    train_until,
)

import sculptor
from sculptor import AnalyzeSettings, TrainSettings
from sculptor.errors import SettingsError, Stopped

COVERS = ["sculptor.training.stepping.added_up_at_owners"]
CPU = {"device": "cpu"}


def settings(**changes: Any) -> TrainSettings:
    """Three micro-batches a step in one process, clipped."""
    chosen: dict[str, Any] = {
        "max_steps": 20,
        "batch_size": 7,
        "micro_batch_size": 3,
        "clip": 0.05,
        "learning_rate": 3e-3,
    }
    return TrainSettings(**CPU, **(chosen | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    save_checkpoint(path / "llama")
    rows = write_rows(path / "rows.jsonl", task_rows())
    sculptor.analyze(path / "llama", path / "weights", AnalyzeSettings(preserve=0.5, **CPU))
    sculptor.analyze(path / "llama", path / "curvature", AnalyzeSettings(basis="curvature", data=(str(rows),), **CPU))
    return path


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_training(base: Path, one: Path, several: Path, tolerance: float = 1e-4) -> None:
    assert losses(several) == pytest.approx(losses(one), abs=1e-5)
    before, after, found = (load_file(path / "model.safetensors") for path in (base, one, several))
    for name, weight in before.items():
        update = (after[name].double() - weight.double()).norm()
        assert (found[name].double() - after[name].double()).norm() <= tolerance * update, name


def same_files(one: Path, other: Path) -> bool:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names if (one / name).is_file())


SHARD = {"parallel": "shard"}


@pytest.mark.parametrize(
    ("family", "size", "changes"),
    [
        ("llama", 2, SHARD),
        *slowly(("t5", 3, {})),
        *slowly(*((family, 2, {}) for family in ("llama", "llama-tied", "qwen3", "t5", "mixtral"))),
        *slowly(("llama", 3, {}), ("mixtral", 3, {})),
        *slowly(*((family, 2, SHARD) for family in ("llama-tied", "qwen3", "t5", "mixtral"))),
        ("llama", 2, SHARD | {"offload": "bases"}),
        *slowly(*((family, 3, SHARD | {"offload": "cpu"}) for family in ("llama", "t5", "mixtral"))),
        *slowly(
            ("llama", 2, SHARD | {"clip_by": "matrix"}), ("opt", 2, SHARD | {"offload": "cpu", "optimizer_on": "host"})
        ),
    ],
)
def test_training_is_that_of_one_process(family: str, size: int, changes: dict[str, Any], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    config = json.loads((model / "config.json").read_text())
    drawn = {name: 0.0 for name in ("dropout_rate", "dropout", "attention_dropout") if config.get(name)}
    if drawn:  # every process draws its own
        (model / "config.json").write_text(json.dumps(config | drawn))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    sculptor.analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, **CPU))
    inputs = (model, tmp_path / "archive", [rows])
    watched = {"eval_data": [rows]}
    alone = {name: value for name, value in changes.items() if name == "clip_by"}
    expected = sculptor.train(*inputs, tmp_path / "one", settings(also_train=("*norm*",), **alone), **watched)
    chosen = settings(also_train=("*norm*",), **changes)
    found = together(size, sculptor.train, *inputs, tmp_path / "several", chosen, **watched)
    assert all(report == found[0] for report in found), "every process is told the same"
    assert found[0].loop.best_loss == pytest.approx(expected.loop.best_loss, abs=1e-5)
    assert found[0].loop.tokens == expected.loop.tokens
    assert_same_training(model, tmp_path / "one", tmp_path / "several")
    checked = sculptor.verify(model, tmp_path / "several", tmp_path / "archive", **CPU)
    assert checked.passed
    assert checked.leak <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", *slowly("shard")])
def test_moments_are_carried_on_together(made: Path, parallel: Any, tmp_path: Path) -> None:
    inputs = (made / "llama", made / "curvature", [made / "rows.jsonl"])
    sculptor.train(*inputs, tmp_path / "one", settings(max_steps=3))
    together(2, sculptor.train, *inputs, tmp_path / "two", settings(max_steps=3, parallel=parallel))
    # AdamW moves what has next to no gradient by as much as the rest: of rounding, it makes a step.
    assert_same_training(made / "llama", tmp_path / "one", tmp_path / "two", 2e-3)
    one, two = (sculptor.Archive(tmp_path / name / "subspaces") for name in ("one", "two"))
    assert list(one) == list(two)
    assert one.manifest.tasks == two.manifest.tasks
    assert [record.rule.kind for record in one.values()] == [record.rule.kind for record in two.values()]
    assert sculptor.verify(tmp_path / "two", tmp_path / "two", tmp_path / "two" / "subspaces", **CPU).passed


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", *slowly("shard")])
def test_rules_are_opened_together(made: Path, parallel: Any, tmp_path: Path) -> None:
    sculptor.analyze(made / "llama", tmp_path / "archive", AnalyzeSettings(rule="lowrank", rank=4, **CPU))
    inputs = (made / "llama", tmp_path / "archive", [made / "rows.jsonl"])
    sculptor.train(*inputs, tmp_path / "one", settings(max_steps=3))
    together(2, sculptor.train, *inputs, tmp_path / "two", settings(max_steps=3, parallel=parallel))
    assert_same_training(made / "llama", tmp_path / "one", tmp_path / "two", 2e-3)
    assert sculptor.verify(made / "llama", tmp_path / "two", tmp_path / "two" / "opened", **CPU).passed
    one, two = (sculptor.Archive(tmp_path / name / "subspaces") for name in ("one", "two"))
    assert [record.rule.shapes for record in one.values()] == [record.rule.shapes for record in two.values()]


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"preserve": 0.5}, 2),
        ({"basis": "curvature"}, 3),
        *slowly(
            ({"rule": "lowrank", "basis": "inputs"}, 2),
            ({"rule": "mask"}, 2),
            ({"rule": "rotation", "preserve": 0.4}, 2),
        ),
        *slowly(({"basis": "inputs"}, 2), ({"basis": "curvature"}, 2), ({"preserve": 0.3, "constraint": "core"}, 3)),
        *slowly(
            ({"basis": "curvature", "data": ("self",)}, 2),
        ),
    ],
)
def test_archives_are_the_same_bytes(made: Path, changes: dict[str, Any], size: int, tmp_path: Path) -> None:
    if "basis" in changes:
        changes = {"data": (str(made / "rows.jsonl"),)} | changes
    chosen = AnalyzeSettings(**CPU, **changes)
    sculptor.analyze(made / "llama", tmp_path / "one", chosen)
    together(size, sculptor.analyze, made / "llama", tmp_path / "several", chosen)
    assert same_files(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
def test_a_few_blocks_at_a_time_are_the_same_too(made: Path, tmp_path: Path) -> None:
    chosen = AnalyzeSettings(basis="curvature", data=(str(made / "rows.jsonl"),), device_memory=1e-9, **CPU)
    sculptor.analyze(made / "llama", tmp_path / "one", chosen)
    together(2, sculptor.analyze, made / "llama", tmp_path / "two", chosen)
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_verification_is_that_of_one_process(made: Path, tmp_path: Path) -> None:
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    sculptor.train(*inputs, tmp_path / "tuned", settings(max_steps=2))
    files = (made / "llama", tmp_path / "tuned", made / "weights")
    expected = sculptor.verify(*files, **CPU)
    assert together(3, sculptor.verify, *files, **CPU) == [expected] * 3


@pytest.mark.slow
def test_what_is_fetched_ahead_changes_nothing(made: Path, tmp_path: Path) -> None:
    """As on a GPU."""
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    watched = {"eval_data": [made / "rows.jsonl"]}
    for changes in ({}, {"offload": "cpu", "offload_inputs": True, "optimizer_on": "host"}):
        name = f"ahead-{len(changes)}"
        chosen = settings(max_steps=6, save_every=2, **SHARD, **changes)
        together(2, sculptor.train, *inputs, tmp_path / f"plain-{len(changes)}", chosen, **watched)
        together(2, train_ahead, *inputs, tmp_path / name, chosen, **watched)
        for file in ("model.safetensors", "subspaces/archive.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"plain-{len(changes)}" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("run", [sculptor.train, train_ahead])
def test_layers_that_are_dropped_stop_nobody(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.OPTConfig(
        **(SMALL | {"num_hidden_layers": 4}), ffn_dim=48, word_embed_proj_dim=32, layerdrop=0.5, **IDS
    )
    monkeypatch.setitem(FAMILIES, "dropping", lambda: transformers.OPTForCausalLM(config))
    model = save_checkpoint(tmp_path / "model", "dropping")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    sculptor.analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, **CPU))
    chosen = settings(parallel="shard", batch_size=3, micro_batch_size=1)
    together(2, run, model, tmp_path / "archive", [rows], tmp_path / "out", chosen)
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]
    assert sculptor.verify(model, tmp_path / "out", tmp_path / "archive", **CPU).passed


@pytest.mark.slow
def test_a_divided_model_is_held_once(made: Path, tmp_path: Path) -> None:
    """Its blocks, and what is trained of them, beside one block on its way; what is planned is what is taken."""
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    found = together(2, held_bytes, *inputs, tmp_path / "out", settings(max_steps=1, carry="keep", **SHARD))
    archive = sculptor.Archive(made / "weights")
    checkpoint = load_file(made / "llama" / "model.safetensors")
    blocks = [t.numel() * 4 for name, t in checkpoint.items() if ".layers." in name]
    assert sum(weights for _, weights, _ in found) == pytest.approx(sum(blocks), rel=0.05)
    assert sum(state for *_, state in found) == pytest.approx(12 * archive.num_free, rel=0.05)
    assert max(weights for _, weights, _ in found) <= 0.6 * sum(blocks)
    assert max(slot for slot, *_ in found) == pytest.approx(sum(blocks) / 2, rel=0.05)


@pytest.mark.slow
def test_a_run_goes_on_divided_and_whole_by_turns(made: Path, tmp_path: Path) -> None:
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    watched = {"eval_data": [made / "rows.jsonl"]}
    sculptor.train(*inputs, tmp_path / "whole", settings(max_steps=12, save_every=1), **watched)
    parts: list[tuple[int, Any]] = [(2, "shard"), (2, "replicate"), (1, "auto"), (3, "shard")]
    for turn, (size, parallel) in enumerate(parts):
        chosen = settings(max_steps=12, save_every=1, parallel=parallel)
        run = train_until if size == 1 else functools.partial(together, size, train_until)
        steps = 3 if turn < 3 else 9
        ends = pytest.raises((Failed, Stopped)) if turn < 3 else contextlib.nullcontext()
        with ends as stopped:
            run(steps, *inputs, tmp_path / "parts", chosen, resume=True, **watched)
        assert stopped is None or f"after step {3 * turn + 3} of 12" in str(stopped.value)
    assert_same_training(made / "llama", tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_divided_run_goes_on_bit_for_bit(made: Path, tmp_path: Path) -> None:
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    together(2, sculptor.train, *inputs, tmp_path / "whole", settings(max_steps=6, **SHARD))
    with pytest.raises(Failed, match="after step 2 of 6; the state is saved"):
        together(2, train_until, 2, *inputs, tmp_path / "cut", settings(max_steps=6, **SHARD))
    together(2, sculptor.train, *inputs, tmp_path / "cut", settings(max_steps=6, **SHARD), resume=True)
    for file in ("model.safetensors", "subspaces/archive.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(made: Path, tmp_path: Path) -> None:
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    chosen = settings(max_steps=9, save_every=1)
    watched = {"eval_data": [made / "rows.jsonl"]}
    sculptor.train(*inputs, tmp_path / "whole", chosen, **watched)
    for size, done in ((2, 3), (1, 6)):
        run = train_until if size == 1 else functools.partial(together, size, train_until)
        with pytest.raises((Failed, Stopped)) as stopped:
            run(3, *inputs, tmp_path / "parts", chosen, resume=True, **watched)
        assert f"after step {done} of 9" in str(stopped.value)
    together(3, sculptor.train, *inputs, tmp_path / "parts", chosen, resume=True, **watched)
    assert_same_training(made / "llama", tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts.partial").exists()


@pytest.mark.slow
def test_a_run_of_two_goes_on_bit_for_bit(made: Path, tmp_path: Path) -> None:
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    together(2, sculptor.train, *inputs, tmp_path / "whole", settings(max_steps=6))
    with pytest.raises(Failed, match="after step 2 of 6; the state is saved"):
        together(2, train_until, 2, *inputs, tmp_path / "cut", settings(max_steps=6))
    together(2, sculptor.train, *inputs, tmp_path / "cut", settings(max_steps=6), resume=True)
    for file in ("model.safetensors", "subspaces/archive.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_more_processes_than_rows(made: Path, parallel: Any, tmp_path: Path) -> None:
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    chosen = settings(max_steps=3, batch_size=1, micro_batch_size=1)
    sculptor.train(*inputs, tmp_path / "one", chosen)
    together(3, sculptor.train, *inputs, tmp_path / "three", dataclasses.replace(chosen, parallel=parallel))
    assert_same_training(made / "llama", tmp_path / "one", tmp_path / "three")


@pytest.mark.slow
def test_what_is_wrong_is_told_once(made: Path, tmp_path: Path) -> None:
    rows = [made / "rows.jsonl"]
    with pytest.raises(Failed) as found:
        together(2, sculptor.train, made / "llama", made / "no archive", rows, tmp_path / "out", settings())
    assert [error and error[0] for error in found.value.errors] == ["ArchiveError", "PeerError"]
    with pytest.raises(Failed) as found:
        together(2, sculptor.train, made / "llama", made / "weights", rows, tmp_path / "out", settings(offload="disk"))
    assert [error and error[0] for error in found.value.errors] == ["SettingsError", "PeerError"]
    with pytest.raises(SettingsError, match="--parallel shard without effect in one process"):
        sculptor.train(made / "llama", made / "weights", rows, tmp_path / "out", settings(parallel="shard"))
    with pytest.raises(Failed) as found:
        together(2, sculptor.train, made / "llama", made / "weights", rows, made / "llama", settings())
    assert [error and error[0] for error in found.value.errors] == ["OutputError", "PeerError"]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_data_that_differ_are_refused(made: Path, tmp_path: Path) -> None:
    """Two machines may hold other files of the same name."""
    (tmp_path / "other").mkdir()
    other = write_rows(tmp_path / "other" / "rows.jsonl", task_rows()[1:])
    rows = [made / "rows.jsonl", other]
    with pytest.raises(Failed, match=r"process 1 .* other inputs"):
        together(
            2,
            train_on,
            made / "llama",
            made / "weights",
            tmp_path / "out",
            settings(max_steps=1),
            by_rank=rows,
        )
    assert not (tmp_path / "out").exists()


def launch(count: int, *arguments: object, **options: Any) -> list["subprocess.Popen[str]"]:
    """The command in several processes, as torchrun starts them."""
    port = free_port()
    command = [sys.executable, "-m", "sculptor", *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env=os.environ | environment(rank, count, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    texts = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.slow
def test_the_command_speaks_once(made: Path, tmp_path: Path) -> None:
    train = ("train", made / "llama", "--subspaces", made / "weights", "--data", made / "rows.jsonl", "--device", "cpu")
    first, second = finish(launch(2, *train, "-o", tmp_path / "out", "--max-steps", 2, "--learning-rate", "1e-3"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "loss" in first[1]
    assert second[1:] == ("", "")
    for arguments, word in (
        ((*train, "-o", tmp_path / "out"), "exists"),
        (("inspect", made / "weights"), "nothing to share"),
    ):
        first, second = finish(launch(2, *arguments))
        assert first[0] in (1, 2)
        assert second[0] in (1, 2)
        assert first[2].count("\n") == 1
        assert word in first[2]
        assert second[1:] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_others(made: Path, tmp_path: Path, killed: int, parallel: str) -> None:
    train = ("train", made / "llama", "--subspaces", made / "weights", "--data", made / "rows.jsonl", "--device", "cpu")
    command = (*train, "-o", tmp_path / "out", "--max-steps", 40, "--save-every", 2, "--learning-rate", "1e-5")
    command += ("--parallel", parallel)
    processes = launch(2, *command)
    while not any((tmp_path / "out.partial" / "state").glob("step-*")):
        assert processes[0].poll() is None, processes[0].communicate()
    processes[killed].send_signal(signal.SIGKILL)
    found = finish(processes)
    left = found[1 - killed]
    assert left[0] == 1
    assert left[2].count("\n") == 1, left[2]
    assert left[2].startswith("error: another process of this run ended (")
    assert "; look at what it said, and start the run again with --resume" in left[2]
    assert not (tmp_path / "out").exists()
    done = finish(launch(2, *command, "--resume"))
    assert [code for code, *_ in done] == [0, 0], done


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_a_full_disk_ends_all(made: Path, parallel: Any, tmp_path: Path) -> None:
    """The first process writes; the others hear of it."""
    inputs = (made / "llama", made / "weights", [made / "rows.jsonl"])
    with pytest.raises(Failed) as found:
        together(2, on_a_small_disk, *inputs, tmp_path / "out", settings(parallel=parallel))
    assert found.value.errors[0] is not None
    assert found.value.errors[0][0] == "OutputError"
    assert found.value.errors[1] is not None
    assert found.value.errors[1][0] == "PeerError"


def test_a_full_disk_elsewhere_ends_an_analysis_that_goes_on(made: Path, tmp_path: Path) -> None:
    chosen = AnalyzeSettings(preserve=0.5, **CPU)
    with pytest.raises(Failed) as failed:
        together(2, analyze_on_a_small_disk, made / "llama", tmp_path / "archive", chosen)
    first, second = failed.value.errors
    assert first is not None
    assert first[0] == "PeerError"
    assert second is not None
    assert second[0] == "OutputError"
    assert "cannot write" in second[1]
    assert not (tmp_path / "archive").exists()
    together(2, sculptor.analyze, made / "llama", tmp_path / "archive", chosen, resume=True)
    assert same_files(made / "weights", tmp_path / "archive")


def test_torch_is_not_asked_twice() -> None:
    assert not torch.distributed.is_initialized(), "tests that run alone stay alone"
