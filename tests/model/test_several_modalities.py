"""Models that see, too, trained on text: experts that are stacked and turned, towers left alone, own terms of the loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, train, verify
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.model.probe import tell_own_terms

COVERS = ["sculptor.checkpoint.sharing"]
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
    "deepstack_visual_indexes": [1],
}  # fmt: skip
IDS = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}


def seeing(**text: Any) -> Any:
    """Qwen3-VL with experts."""
    config = transformers.Qwen3VLMoeConfig(text_config=TEXT | text, vision_config=VISION, **IDS)
    torch.manual_seed(0)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_towers_are_left_alone_and_every_way_reads_the_same_experts(tmp_path: Path) -> None:
    base = save(seeing(), tmp_path / "base")
    architecture = inspect_architecture(open_checkpoint(base))
    assert not any("visual" in target.name for target in architecture.targets)
    reasons = {item.role: item.reason for item in architecture.not_targeted}
    assert reasons["model.visual.blocks.*.attn.qkv.weight"] == "no text reaches it"
    assert reasons["model.language_model.layers.*.mlp.experts.gate_up_proj"] == "split or joined when it is loaded"
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    losses = set()
    for offload in ("none", "cpu", "disk"):
        settings = TrainSettings(max_steps=2, batch_size=4, device="cpu", offload=offload)  # type: ignore[arg-type]
        report = train(base, tmp_path / "archive", [rows], tmp_path / offload, settings)
        losses.add(round(report.loop.first_loss, 5))
        assert verify(base, tmp_path / offload, tmp_path / "archive", device="cpu").passed
    assert len(losses) == 1


def with_experts(path: Path, **asked: Any) -> Path:
    """JetMoe, whose coefficient has a name of its own."""
    config = transformers.JetMoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=0, pad_token_id=1, **asked,
    )  # fmt: skip
    torch.manual_seed(0)
    return save(transformers.JetMoeForCausalLM(config), path)


def with_squares(path: Path, **asked: Any) -> Path:
    """Bamba, whose loss has the squares of its partition functions in it."""
    config = transformers.BambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8,
        mamba_expand=2, mamba_chunk_size=8, max_position_embeddings=64, eos_token_id=0, pad_token_id=1, **asked,
    )  # fmt: skip
    torch.manual_seed(0)
    return save(transformers.BambaForCausalLM(config), path)


CASES: dict[str, tuple[Callable[..., Path], dict[str, Any], bool]] = {
    "coefficient of another name": (with_experts, {"output_router_logits": True, "aux_loss_coef": 0.5}, True),
    "coefficient of the text": (
        lambda path, **asked: save(seeing(**asked), path),
        {"output_router_logits": True, "router_aux_loss_coef": 0.5},
        True,
    ),
    "term that is not known": (with_squares, {"z_loss_coefficient": 0.5}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_models_own_terms_are_trained_or_told(tmp_path: Path, case: str) -> None:
    make, asked, known = CASES[case]
    base = make(tmp_path / "base", **asked)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "w1 w2 w3 w4 w5 w6"}] * 4)
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    told: list[str] = []
    settings = TrainSettings(max_steps=1, batch_size=4, micro_batch_size=4, device="cpu")
    report = train(base, tmp_path / "archive", [rows], tmp_path / "out", settings, notice=told.append)
    ids = torch.tensor([make_tokenizer()("w1 w2 w3 w4 w5 w6").input_ids] * 4)
    own = getattr(transformers, open_checkpoint(base).config["architectures"][0]).from_pretrained(base).eval()
    with torch.no_grad():
        expected = float(own(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss)
    line = next((line for line in told if "own loss" in line), None)
    if known:
        assert report.loop.first_loss == pytest.approx(expected, rel=1e-4)
        assert line is None
    else:
        assert report.loop.first_loss < expected - 1
        assert line is not None
        assert "BambaForCausalLM" in line


def test_a_decoder_that_wants_shifted_labels_has_no_other_terms(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True,
        is_encoder_decoder=False, max_position_embeddings=64, eos_token_id=0, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = save(transformers.BartForCausalLM(config), tmp_path / "base")
    told: list[str] = []
    checkpoint = open_checkpoint(base)
    model = transformers.BartForCausalLM.from_pretrained(base).eval()
    tell_own_terms(inspect_architecture(checkpoint), model, torch.device("cpu"), told.append)
    assert told == []
