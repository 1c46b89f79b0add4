"""`--attn-implementation`: the model that runs has it, and the record says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows


@pytest.mark.slow
def test_commands_that_run_a_model_choose_its_attention(
    tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sculptor.model.probe import check_model

    seen: list[Any] = []

    def look(checkpoint: Any, architecture: Any, model: Any, *rest: Any, **more: Any) -> None:
        seen.append(model.config._attn_implementation)
        check_model(checkpoint, architecture, model, *rest, **more)

    monkeypatch.setattr("sculptor.model.load.check_model", look)
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows(count=6))
    eager = ("--attn-implementation", "eager", "--device", "cpu")
    analyze = ("analyze", model, "--data", rows, "-o", tmp_path / "a", "--calibration-tokens", 60)
    train = ("train", model, "--subspaces", tmp_path / "a", "--data", rows, "-o", tmp_path / "t", "--max-steps", 1)
    evaluate = ("evaluate", model, "--watch", rows)
    assert cli(*evaluate, "--device", "cpu").code == 0
    assert seen == ["sdpa"]
    for command in (analyze, (*train, "--offload", "cpu", "--memory-rows", 2), evaluate):
        seen.clear()
        found = cli(*command, *eager)
        assert found.code == 0, found.err
        assert set(seen) == {"eager"}, command
    record = json.loads((tmp_path / "t" / "sculptor.json").read_text())
    assert record["settings"]["attn_implementation"] == "eager"
    archive = json.loads((tmp_path / "a" / "archive.json").read_text())
    assert archive["settings"]["attn_implementation"] == "eager"
    for command in (analyze, train, evaluate):
        for name in ("egaer", "flash_attention_2"):
            found = (
                cli(*command, "--overwrite", "--attn-implementation", name)
                if command != evaluate
                else cli(*command, "--attn-implementation", name)
            )
            assert (found.code, found.err.count("\n")) == (2, 1), found.err
            assert f"--attn-implementation {name}: not to be had" in found.err
    idle = cli("analyze", model, "--preserve", 0.5, "-o", tmp_path / "b", *eager)
    assert (idle.code, idle.err.count("\n")) == (2, 1)
    assert "--attn-implementation without effect" in idle.err
