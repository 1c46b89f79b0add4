"""The whole job by its commands, on every kind of model: analyze, train, verify, a second task, evaluate, load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, Result, save_checkpoint, slowly, task_rows, write_rows

COVERS = ["sculptor.tasks.inspect_archive", "sculptor.jobs.next_archive"]
TRAIN = ("--max-steps", 12, "--batch-size", 8, "--learning-rate", "1e-2", "--device", "cpu")


@pytest.mark.parametrize(
    ("family", "constraint"),
    [
        ("llama", "double"),
        ("gpt2", "core"),
        *slowly(
            ("t5", "input"),
            ("mixtral", "double"),
            ("llama", "core"),
            ("qwen3", "double"),
            ("qwen3", "input"),
            ("gpt2", "double"),
            ("t5", "double"),
            ("bert", "double"),
        ),
    ],
)
def test_two_tasks_in_a_row(cli: Callable[..., Result], tmp_path: Path, family: str, constraint: str) -> None:
    model = save_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, max_shard_size="30KB")
    kind = "text" if family == "bert" else "pairs"
    first = write_rows(tmp_path / "first.jsonl", task_rows(kind))
    second = write_rows(tmp_path / "second.jsonl", task_rows(kind, 16))
    archive = tmp_path / "archive"

    made = cli(
        "analyze", model, "-o", archive, "--preserve", 0.5, "--constraint", constraint, "--device", "cpu", "--json"
    )
    assert made.code == 0, made.err
    expected = sum(role["num_matrices"] for role in made.json["roles"])
    if family == "mixtral":
        assert {item["role"] for item in made.json["not_targeted"]} == {"model.layers.*.mlp.gate.weight"}

    outputs, current, subspaces = [], model, archive
    for data in (first, second):
        output = tmp_path / f"tuned-{data.stem}"
        trained = cli("train", current, "--subspaces", subspaces, "--data", data, "-o", output, *TRAIN)
        assert trained.code == 0, trained.err
        assert "Wrote" in trained.out
        verified = cli("verify", current, output, "--subspaces", subspaces, "--device", "cpu", "--json")
        assert verified.code == 0, verified.out + verified.err
        assert verified.json["passed"]
        assert verified.json["num_targets"] == expected
        # An expert that no token is sent to is not trained.
        assert (
            8 < verified.json["num_changed"] <= expected
            if family == "mixtral"
            else verified.json["num_changed"] == expected
        )
        outputs.append(output)
        current, subspaces = output, output / "subspaces"
    across = cli("verify", model, outputs[1], "--subspaces", archive, "--device", "cpu", "--json")
    assert across.code == 0, across.out + across.err

    inspected = cli("inspect", subspaces, "--model", current, "--json")
    assert inspected.code == 0, inspected.err
    assert inspected.json["belongs"] is True
    assert [task["name"] for task in inspected.json["tasks"]] == ["analysis", "first", "second"]
    assert {"0", "1", "2"} == {task for matrix in inspected.json["matrices"] for task in matrix["added"]}

    measured = [
        cli("evaluate", path, "--data", first, "--device", "cpu", "--json").json for path in (model, outputs[0])
    ]
    assert measured[1]["loss"] < measured[0]["loss"]
    assert (measured[0]["accuracy"] is None) == (family == "bert")

    loaded = type(FAMILIES[family]()).from_pretrained(current)
    assert loaded.dtype == torch.bfloat16
    record = json.loads((current / "sculptor.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-2
    assert len(record["lineage"]) == 2
    assert len(record["matrices"]) == expected
    metrics = [json.loads(line) for line in (current / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 13))


def test_retake_and_adaptive_rank(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    data = write_rows(tmp_path / "task.jsonl", task_rows())
    assert (
        cli("analyze", model, "-o", tmp_path / "a", "--basis", "weights", "--data", data, "--device", "cpu").code == 0
    )
    trained = cli(
        "train", model, "--subspaces", tmp_path / "a", "--data", data, "-o", tmp_path / "b", "--carry", "retake", *TRAIN
    )
    assert trained.code == 0, trained.err
    before, after = (cli("inspect", path, "--json").json for path in (tmp_path / "a", tmp_path / "b" / "subspaces"))
    assert [m["preserved"] for m in before["matrices"]] == [m["preserved"] for m in after["matrices"]]
    assert before["base_identity"] != after["base_identity"]


def test_tasks_go_on_until_no_capacity_is_left(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Matrices freeze one by one and are listed; then train refuses."""
    model = save_checkpoint(tmp_path / "model")
    data = write_rows(tmp_path / "task.jsonl", task_rows())
    archive = tmp_path / "archive"
    cli("analyze", model, "-o", archive, "--preserve", 0.95, "--device", "cpu")
    frozen = 0
    for task in range(12):
        output = tmp_path / f"out{task}"
        found = cli(
            "train", model, "--subspaces", archive, "--data", data, "-o", output, "--max-steps", 1, "--device", "cpu"
        )
        if found.code:
            break
        listed = json.loads((output / "sculptor.json").read_text())["frozen"]
        assert len(listed) >= frozen
        frozen = len(listed)
        assert ("nothing left free" in found.out) == bool(frozen)
        model, archive = output, output / "subspaces"
    assert found.code == 1
    assert "no capacity left: all 14 matrices are frozen" in found.err
    assert frozen == 14


@pytest.mark.slow
def test_the_small_trained_model(cli: Callable[..., Result], tmp_path: Path, shared: Path) -> None:
    """A really trained checkpoint, three shards, bf16: a short run learns, and the proof holds."""
    model, data = shared / "models" / "tiny-llama", shared / "data" / "cl" / "agnews"
    assert cli("analyze", model, "-o", tmp_path / "a", "--preserve", 0.5, "--device", "cpu").code == 0
    arguments = ("--data", data / "train.jsonl", "--max-steps", 8, "--max-length", 128, "--device", "cpu")
    trained = cli("train", model, "--subspaces", tmp_path / "a", "-o", tmp_path / "b", *arguments)
    assert trained.code == 0, trained.err
    assert cli("verify", model, tmp_path / "b", "--subspaces", tmp_path / "a", "--device", "cpu").code == 0
    before, after = (
        cli("evaluate", path, "--data", data / "validation.jsonl", "--device", "cpu", "--json").json["loss"]
        for path in (model, tmp_path / "b")
    )
    assert after < before / 2
