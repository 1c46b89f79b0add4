"""Rows at a time: what their caches take, by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_checkpoint

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.model import room
from sculptor.model.load import load_model
from sculptor.model.room import cache_bytes, rows_at_once, rows_within


@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("gpt2", 2), ("t5", 2), ("mpt", 2)])
def test_a_cache_has_the_size_that_the_model_makes(tmp_path: Path, family: str, layers: int) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / family, family)), torch.device("cpu"))
    if loaded.kind == "causal":
        made = loaded.model(input_ids=torch.tensor([[4, 5, 6]]), use_cache=True)
        cache = made["cache"] if "cache" in made else made["past_key_values"]
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cache_bytes(loaded) == held / 3
    else:
        width = loaded.model.get_input_embeddings().weight.shape[1]
        assert cache_bytes(loaded) == 2 * layers * width * 4


def test_rows_keep_to_the_room() -> None:
    assert rows_within(6e9, 23_040, 1024, 0) == 254  # SmolLM2-135M
    assert rows_within(6e9, 524_288, 1024, 0) == 11  # Llama-2-7B
    assert rows_within(6e9, 23_040, 100, 0) == 256
    assert rows_within(1e3, 524_288, 1024, 0) == 1
    with_scores = rows_within(6e9, 106_496, 1024, 8)
    assert with_scores * 1024 * (106_496 + 6 * 8 * 1024) <= 6e9 < (with_scores + 1) * 1024 * (106_496 + 6 * 8 * 1024)


@pytest.mark.parametrize(("family", "all_logits"), [("llama", False), ("gpt2", False), ("t5", True), ("bert", True)])
def test_logits_that_a_model_makes_of_all_tokens_count(
    tmp_path: Path, family: str, all_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / family, family)), torch.device("cpu"))
    held = sum(value.nbytes for value in loaded.model.parameters())
    per_token = cache_bytes(loaded) + (6 * loaded.architecture.vocab_size if all_logits else 0)
    total = SimpleNamespace(total_memory=held + 4 * 5.5 * 32 * per_token)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    assert rows_at_once(replace(loaded, device=torch.device("cuda")), 32) == 5


def test_a_gpu_that_the_model_fills_takes_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "model")), torch.device("cpu"))
    assert rows_at_once(loaded, 1024) == room.PLANNED_ROWS
    loaded = replace(loaded, device=torch.device("cuda"))
    held = sum(value.nbytes for value in loaded.model.parameters())
    per_row = 64 * cache_bytes(loaded)
    for left, rows in ((4 * 100 * per_row, 100), (4 * 3.5 * per_row, 3), (0, 1), (-5, 1), (1e15, 256)):
        total = SimpleNamespace(total_memory=held + left)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, total=total: total)
        assert rows_at_once(loaded, 64) == rows
