"""The summed loss against transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_tokenizer, save_checkpoint
from torch import nn

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import IGNORED
from sculptor.errors import CheckpointError, SettingsError
from sculptor.model.load import load_model, resolve_device
from sculptor.model.loss import batch_loss, num_loss_tokens


def ragged(generator: torch.Generator) -> Batch:
    ids = torch.randint(4, 44, (3, 8), generator=generator)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 3 + [0] * 5])
    labels = torch.where(mask == 1, ids, IGNORED)
    labels[0, :4] = IGNORED
    return Batch(torch.where(mask == 1, ids, 1), mask, labels)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_the_model_s_own(family: str, tmp_path: Path, generator: torch.Generator) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "m", family)), torch.device("cpu"))
    batch = ragged(generator)
    with torch.no_grad():
        found = batch_loss(loaded.model, batch, loaded.kind)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        reference = loaded.model(**inputs, labels=batch.labels).loss
    assert found.num_tokens == num_loss_tokens(batch, loaded.kind)
    torch.testing.assert_close(found.total / found.num_tokens, reference, atol=1e-5, rtol=1e-5)


def test_tokens_count_as_they_are_weighed(tmp_path: Path, generator: torch.Generator) -> None:
    """By the labels in the place where they are predicted; tokens without loss are not asked for."""
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "m")), torch.device("cpu"))
    batch = ragged(generator)
    weights = torch.rand(3, 7, generator=generator)
    with torch.no_grad():
        found = batch_loss(loaded.model, batch, "causal", weigh=lambda labels: weights.expand_as(labels))
        logits = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double()
    labels = batch.labels[:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    assert float(found.total) == pytest.approx(float((weights * each).sum()), rel=1e-5)
    assert found.num_tokens == int((labels != IGNORED).sum())


def test_a_router_s_loss_is_added(tmp_path: Path, generator: torch.Generator) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "m", "mixtral")), torch.device("cpu"))
    loaded.model.config.output_router_logits = True
    batch = ragged(generator)
    with torch.no_grad():
        found = batch_loss(loaded.model, batch, "causal")
        reference = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert found.auxiliary is not None
    torch.testing.assert_close(found.total / found.num_tokens + found.auxiliary, reference.loss, atol=1e-5, rtol=1e-5)


def test_headless_and_incomplete_models_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    from sculptor.checkpoint.architecture import inspect_architecture

    path = tmp_path / "headless"
    BertModel(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(
        path
    )
    assert inspect_architecture(open_checkpoint(path)).kind == "headless"
    with pytest.raises(CheckpointError, match="BertModel has no language-modelling head"):
        load_model(open_checkpoint(path), torch.device("cpu"))


def test_a_missing_head_is_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not in the files and would be random, first lm_head.weight"):
        load_model(open_checkpoint(path), torch.device("cpu"))


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load_model(open_checkpoint(path), torch.device("cpu"))


def test_unknown_devices_are_refused() -> None:
    assert resolve_device("cpu").type == "cpu"
    reasons = {
        "nonsense": "",
        "mps": "Apple's GPUs have no float64",
        "hip": "torch calls the GPUs of ROCm cuda",
        "meta": "neither",
    }
    for name, reason in reasons.items():
        with pytest.raises(SettingsError, match=rf"--device {name}: not available \({reason}.*; use auto, cpu, cuda"):
            resolve_device(name)


def test_gpus_of_rocm_go_by_the_name_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch for ROCm answers to `torch.cuda`; an Apple GPU beside a CPU is not chosen."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cpu")


def test_nan_anywhere_in_the_model_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = save_checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 3] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight has NaN"):
        load_model(open_checkpoint(path), torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_tokenizer_without_the_tokens_it_needs_is_refused(tmp_path: Path, family: str) -> None:
    path = save_checkpoint(tmp_path / "m", family)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.mask_token = None
    for file in path.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(path)
    with pytest.raises(CheckpointError, match="no end-of-sequence token" if family == "llama" else "no mask token"):
        load_model(open_checkpoint(path), torch.device("cpu"))
