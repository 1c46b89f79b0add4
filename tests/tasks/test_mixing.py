"""Weights of several data, from the command line to the record."""

import json
from collections.abc import Callable
from pathlib import Path

from conftest import Result, save_checkpoint, task_rows, write_rows


def test_weights_decide_an_epoch(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    task = write_rows(tmp_path / "task.jsonl", task_rows(count=9))
    text = write_rows(tmp_path / "text.jsonl", task_rows("text", 20))
    assert cli("analyze", model, "-o", tmp_path / "archive", "--preserve", 0.5, "--device", "cpu").code == 0
    data = ("--data", f"{task}:0.75", "--data", f"{text}:0.25")
    found = cli(
        "train", model, "--subspaces", tmp_path / "archive", *data, "-o", tmp_path / "out", "--batch-size", 4, "--device", "cpu",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "an epoch takes 9 of 9 from task.jsonl, 3 of 20 from text.jsonl" in found.err
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert record["result"]["steps"] == 3
    assert record["data"]["files"] == ["task.jsonl", "text.jsonl"]
    assert record["data"]["weights"] == [0.75, 0.25]
    shown = cli("data", data[1], data[3], "--model", model, "--json").json
    assert (shown["num_rows"], shown["num_epoch"]) == (29, 12)
    assert [source["num_epoch"] for source in shown["sources"]] == [9, 3]
    planned = cli("estimate", model, *data, "--batch-size", 4, "--device", "cpu", "--json").json
    assert planned["steps"] == 3
    moments = ("analyze", model, "--basis", "curvature", *data, "--device", "cpu", "-o", tmp_path / "moments")
    assert cli(*moments).code == 0
    manifest = json.loads((tmp_path / "moments" / "archive.json").read_text())
    assert manifest["tasks"][0]["weights"] == [1.5, 0.5]
    wrong = cli("evaluate", model, *data, "--device", "cpu")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
