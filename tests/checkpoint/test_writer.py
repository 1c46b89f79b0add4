"""Edited copies of checkpoints: what changes, what stays, and that transformers loads them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.writer import write_checkpoint

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_copy_keeps_layout_bytes_and_companions(tmp_path: Path, max_shard_size: str) -> None:
    source = save_checkpoint(tmp_path / "source", dtype=torch.bfloat16, max_shard_size=max_shard_size)
    (source / "LICENSE").write_text("free")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (source / "pytorch_model.bin").write_bytes(b"never copied")
    (source / "modeling.py").write_text("never copied")
    output = tmp_path / "output"
    output.mkdir()
    write_checkpoint(open_checkpoint(source), output, {NAME: lambda weight: weight + 1})
    before, after = open_checkpoint(source), open_checkpoint(output)
    assert after.files == before.files
    for name in before:
        assert after.infos[name] == before.infos[name]
        assert torch.equal(after[name], before[name] + 1 if name == NAME else before[name])
    copied = {str(file.relative_to(output)) for file in output.rglob("*") if file.is_file()}
    assert copied == {str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()} - {
        "pytorch_model.bin",
        "modeling.py",
    }
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.get_parameter(NAME).detach(), after[NAME])
    assert AutoTokenizer.from_pretrained(output)("w1 w2").input_ids == [5, 6]


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama-tied")
    (tmp_path / "output").mkdir()
    write_checkpoint(open_checkpoint(source), tmp_path / "output", {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "output").infos


def test_a_wider_dtype_splits_shards_at_the_source_limit(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", dtype=torch.bfloat16, max_shard_size="20KB")
    output = tmp_path / "output"
    output.mkdir()
    before = open_checkpoint(source)
    write_checkpoint(before, output, {}, dtype=torch.float32)
    after = open_checkpoint(output)
    limit = max(file.stat().st_size for file in source.glob("*.safetensors"))
    assert len(after.files) > len(before.files)
    assert max(file.stat().st_size for file in output.glob("*.safetensors")) <= limit + 2000  # the header
    for name in before:
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], before[name].float())
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32


def test_every_family_loads_after_a_copy(tmp_path: Path) -> None:
    for family in ("gpt2", "t5", "bert", "mixtral"):
        source = save_checkpoint(tmp_path / family, family)
        (tmp_path / f"{family}-copy").mkdir()
        write_checkpoint(open_checkpoint(source), tmp_path / f"{family}-copy", {})
        cls = type(FAMILIES[family]())
        first, second = (cls.from_pretrained(path).state_dict() for path in (source, tmp_path / f"{family}-copy"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
