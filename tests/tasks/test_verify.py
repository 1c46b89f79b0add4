"""`verify` by its command: three exit codes, and what carries a proof over several tasks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, slowly, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, TrainSettings, analyze, train, verify
from sculptor.errors import ArchiveError, CheckpointError, SettingsError, VerificationError

COVERS = ["sculptor.report.verify"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base, its archive, and what one task made of it."""
    path = tmp_path_factory.mktemp("verify")
    save_checkpoint(path / "base")
    rows = write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "base", path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = TrainSettings(max_steps=5, batch_size=8, learning_rate=1e-2, device="cpu")
    train(path / "base", path / "archive", [rows], path / "tuned", settings)
    return path


def check(cli: Callable[..., Result], *arguments: object) -> Result:
    return cli("verify", *arguments, "--device", "cpu")


def changed(made: Path, output: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The tuned checkpoint with other tensors."""
    shutil.copytree(made / "tuned", output)
    tensors = load_file(output / "model.safetensors")
    change(tensors)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


def test_what_holds_exits_with_0(cli: Callable[..., Result], made: Path) -> None:
    found = check(cli, made / "base", made / "tuned", "--subspaces", made / "archive")
    assert (found.code, found.err) == (0, "")
    as_json = check(cli, made / "base", made / "tuned", "--subspaces", made / "archive", "--json")
    assert as_json.code == 0
    assert as_json.json["passed"] is True
    assert as_json.json["num_changed"] == as_json.json["num_targets"] == 14
    assert as_json.json["num_merges"] == 1


def test_what_does_not_hold_exits_with_1(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    moved = changed(made, tmp_path / "moved", lambda tensors: tensors[name].mul_(1.01))
    found = check(cli, made / "base", moved, "--subspaces", made / "archive", "--json")
    assert found.code == 1
    assert [matrix["name"] for matrix in found.json["matrices"] if not matrix["holds"]] == [name]
    elsewhere = changed(made, tmp_path / "elsewhere", lambda tensors: tensors["model.norm.weight"].add_(1))
    found = check(cli, made / "base", elsewhere, "--subspaces", made / "archive", "--json")
    assert found.code == 1
    assert found.json["changed_elsewhere"] == ["model.norm.weight"]
    text = check(cli, made / "base", elsewhere, "--subspaces", made / "archive")
    assert text.code == 1
    assert "model.norm.weight" in text.out


def test_what_cannot_be_checked_exits_with_2(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    """Whatever the reason: 1 would say that something moved."""
    save_checkpoint(tmp_path / "other", seed=1)
    lacking = changed(made, tmp_path / "lacking", lambda tensors: tensors.pop("lm_head.weight"))
    base, tuned, archive = made / "base", made / "tuned", made / "archive"
    for arguments, needle in (
        ((tmp_path / "none", tuned, archive), "none"),
        ((base, tmp_path / "none", archive), "none"),
        ((base, tuned, tmp_path / "none"), "no archive.json"),
        ((tmp_path / "other", tuned, archive), "archive of another checkpoint"),
        ((base, tuned, tuned / "subspaces"), "archive of another checkpoint"),
        ((base, lacking, archive), "1 missing, 0 added, first lm_head.weight"),
    ):
        found = check(cli, arguments[0], arguments[1], "--subspaces", arguments[2])
        assert (found.code, found.out) == (2, ""), needle
        assert len(found.err.strip().splitlines()) == 1
        assert needle in found.err
    (lacking / "sculptor.json").write_text("{")
    save_file(load_file(tuned / "model.safetensors"), lacking / "model.safetensors", {"format": "pt"})
    found = check(cli, base, lacking, "--subspaces", archive)
    assert found.code == 2
    assert "sculptor.json: damaged" in found.err


def test_the_library_says_which_input_is_wrong(made: Path, tmp_path: Path) -> None:
    base, tuned, archive = made / "base", made / "tuned", made / "archive"
    with pytest.raises(CheckpointError):
        verify(tmp_path / "none", tuned, archive)
    with pytest.raises(ArchiveError):
        verify(base, tuned, tmp_path)
    with pytest.raises(VerificationError):
        verify(tuned, base, archive)
    with pytest.raises(SettingsError):
        verify(base, tuned, archive, device="tpu")


def test_a_bar_counts_matrices(made: Path) -> None:
    seen: dict[str, list[int]] = {}

    class Bar:
        def __init__(self, total: int, desc: str, unit: str, initial: int = 0) -> None:
            self.counts = seen.setdefault(desc, [total, 0])

        def update(self, count: int = 1) -> None:
            self.counts[1] += count

        def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...

        def close(self) -> None: ...

    verify(made / "base", made / "tuned", made / "archive", device="cpu", progress=Bar)
    assert seen["verify"] == [14, 14]
    assert all(total == count for total, count in seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *slowly("float64")])
@pytest.mark.parametrize("preserve", [0.3, *slowly(0.7)])
def test_later_tasks_keep_what_the_first_archive_protects(
    made: Path, dtype: str, preserve: float, tmp_path: Path
) -> None:
    """Whatever the dtype of its bases: they only grow, so what was protected stays so."""
    settings = AnalyzeSettings(preserve=preserve, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    analyze(made / "base", tmp_path / "archive", settings)
    current, archive = made / "base", tmp_path / "archive"
    training = TrainSettings(max_steps=5, batch_size=8, learning_rate=1e-2, device="cpu")
    for i in range(3):
        output = tmp_path / str(i)
        train(current, archive, [made / "rows.jsonl"], output, training)
        assert verify(current, output, archive, device="cpu").passed
        found = verify(made / "base", output, tmp_path / "archive", device="cpu")
        assert found.num_merges == i + 1
        assert found.passed, f"task {i + 1}: leak {found.leak:.1e}, of which rounding explains {found.rounding:.1e}"
        current, archive = output, output / "subspaces"


def test_openly_trained_tensors_are_declared_not_excused(made: Path, tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=2, also_train=("lm_head",), device="cpu")
    train(made / "base", made / "archive", [made / "rows.jsonl"], tmp_path / "out", settings)
    found = verify(made / "base", tmp_path / "out", made / "archive", device="cpu")
    assert found.passed
    assert found.also_trained == ("lm_head.weight",)
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    record["lineage"][-1]["opened"] = []
    (tmp_path / "out" / "sculptor.json").write_text(json.dumps(record))
    found = verify(made / "base", tmp_path / "out", made / "archive", device="cpu")
    assert not found.passed
    assert found.changed_elsewhere == ("lm_head.weight",)
