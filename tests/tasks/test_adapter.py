"""`--merge-adapter`: a LoRA adapter as MODEL."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from edited import save_adapter, tensors_of

import sculptor


def test_commands_merge_an_adapter_when_told(
    tmp_path: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", task_rows(count=4))
    peft = save_adapter(Path("base"), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    analyze = ("analyze", "adapter", "-o", "a", "--preserve", 0.5, "--device", "cpu")
    for command in (
        analyze,
        ("evaluate", "adapter", "--data", "rows.jsonl"),
        ("train", "adapter", "--data", "rows.jsonl", "-o", "t"),
    ):
        found = cli(*command)
        assert (found.code, found.err.count("\n")) == (1, 1)
        assert "--merge-adapter DIR" in found.err
    found = cli(*analyze, "--merge-adapter", "merged")
    assert found.code == 0, found.err
    assert "that is MODEL from now on" in found.err
    expected, made = peft.merge_and_unload().state_dict(), tensors_of(tmp_path / "merged")
    for name, value in made.items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5)
    again = cli(*analyze[:2], "-o", "b", "--preserve", 0.5, "--merge-adapter", "merged")
    assert (again.code, again.err.count("\n")) == (1, 1)
    assert "exists already" in again.err
    assert "give it as MODEL" in again.err
    for output, advice in (
        ("a", "a: exists already; choose another --output or pass --overwrite"),
        ("late/a", "late/a: lies in what is merged first"),
        ("late", "late: lies in what is merged first"),
    ):
        found = cli(*analyze[:2], "-o", output, "--preserve", 0.5, "--merge-adapter", "late")
        assert (found.code, found.err.count("\n")) == (1, 1)
        assert advice in found.err
        assert not (tmp_path / "late").exists(), "nothing is merged for an output that cannot be"
    found = cli(*analyze, "--merge-adapter", "third", "--overwrite")
    assert found.code == 0, found.err
    resumed = cli("train", "adapter", "-o", "t", "--data", "rows.jsonl", "--merge-adapter", "merged", "--resume")
    assert resumed.code == 2
    assert "give merged as MODEL, without --merge-adapter" in resumed.err
    score = cli("evaluate", "adapter", "--data", "rows.jsonl", "--merge-adapter", "other", "--json")
    assert score.code == 0, score.err
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()
    shutil.copytree(tmp_path / "adapter", tmp_path / "talks")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "base" / file, tmp_path / "talks")
    (tmp_path / "talks" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    told: list[str] = []
    sculptor.merge_adapter("talks", "with-talk", device="cpu", notice=told.append)
    assert len(told) == 1
    assert told[0].startswith("talks: not taken of the adapter: chat_template")
    with pytest.raises(sculptor.SculptorError, match="base is no adapter"):
        sculptor.merge_adapter("base", "x")
    (tmp_path / "base").rename(tmp_path / "moved")
    lost = cli("evaluate", "adapter", "--data", "rows.jsonl", "--merge-adapter", "x")
    assert (lost.code, lost.err.count("\n")) == (1, 1)
    assert not (tmp_path / "x").exists()
    assert sculptor.merge_adapter("adapter", "x", base="moved", device="cpu") == tmp_path / "x"
