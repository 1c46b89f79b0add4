"""How many of a task's rows are measured: by the machine, as asked, or as a run began."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.errors import Stopped
from sculptor.jobs import defaults, memory
from sculptor.jobs.job import MEMORY_ROWS
from sculptor.jobs.memory import rows_for
from sculptor.training.state import saved_key

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("size", "lengths", "rows"),
    [
        (134.5e6, [128] * 200, 48),  # 3,700 tokens are 28 rows; 48 at least
        (134.5e6, [20, 40] * 100, 123),  # 3,700 / 30
        (15.7e6, [100] * 9, 300),  # 30,000 tokens, whether or not there are so many rows
        (15.7e6, [10] * 9, MEMORY_ROWS),
        (7e9, [1000] * 9, 48),
        (7e9, [], MEMORY_ROWS),
    ],
)
def test_rows_fit_the_machine(monkeypatch: pytest.MonkeyPatch, size: float, lengths: list[int], rows: int) -> None:
    monkeypatch.setattr(defaults, "num_parameters", lambda _: size)
    monkeypatch.setattr(defaults, "_CPU_TOKENS", (2000, 30_000))
    examples: Any = [SimpleNamespace(length=length) for length in lengths]
    checkpoint: Any = None
    assert rows_for(checkpoint, examples, CPU) == rows
    assert rows_for(checkpoint, examples, CUDA) == MEMORY_ROWS


def test_a_choice_is_told_recorded_and_kept_by_a_resume(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "t.jsonl", task_rows())
    analyze(model, tmp_path / "a", AnalyzeSettings(basis="inputs", data=(str(data),), device="cpu"))
    monkeypatch.setattr(defaults, "_CPU_TOKENS", (1, 1))
    monkeypatch.setattr(memory, "_LEAST", 5)
    command = ("train", model, "--subspaces", tmp_path / "a", "--data", data, "--device", "cpu", "--max-steps", 2)

    def recorded(name: str) -> Any:
        return json.loads((tmp_path / name / "sculptor.json").read_text())["settings"]["memory_rows"]

    found = cli(*command, "-o", tmp_path / "chosen")
    assert found.code == 0, found.err
    assert found.err.startswith(
        "chosen: --memory-rows 5: the next task's archive is measured on so many of the 24 rows;"
    )
    assert "holds what the task uses (5 of its rows were measured) beside" in found.out
    assert recorded("chosen") == 5

    asked = cli(*command, "-o", tmp_path / "asked", "--memory-rows", 7, "--json")
    assert (asked.err, asked.json["num_measured"], recorded("asked")) == ("", 7, 7)

    inputs: Any = (model, tmp_path / "a", data, tmp_path / "cut", TrainSettings(device="cpu", max_steps=2))
    with pytest.raises(Stopped):
        train(*inputs, stop=lambda: 15)
    monkeypatch.setattr(memory, "_LEAST", 6)  # a machine that bears more
    told: list[str] = []
    assert train(*inputs, resume=True, notice=told.append).num_measured == 5
    assert "--memory-rows 5" in told[0]
    for name in ("model.safetensors", "subspaces/subspaces-00001.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "chosen" / name).read_bytes()


def test_a_state_that_cannot_be_read_is_left_to_whoever_takes_it_up(tmp_path: Path) -> None:
    assert saved_key(tmp_path / "none") == {}
    state = tmp_path / "state" / "step-00000003"
    for text in ("{", "[]", '{"key": 3}', '{"key": {"memory_rows": true}}', '{"key": {"memory_rows": -1}}'):
        state.mkdir(parents=True, exist_ok=True)
        (state / "state.json").write_text(text)
        assert memory._began_with(tmp_path) is None
    (state / "state.json").write_text('{"key": {"memory_rows": 9}}')
    assert memory._began_with(tmp_path) == 9
