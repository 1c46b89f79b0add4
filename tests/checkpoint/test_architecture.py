"""Targets of every family, counted; patterns; refusals."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, save_checkpoint
from families import mappings, tiny
from safetensors.torch import load_file, save_file

from sculptor.checkpoint.architecture import ROUTER, inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.selection import select_targets
from sculptor.errors import CheckpointError, SettingsError

QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
GATED = [QKV, {"mlp.gate_proj", "mlp.up_proj"}]
# family: matrices of two layers, kind, which roles share an input
EXPECTED = {
    "llama": (14, "causal", GATED),
    "llama-tied": (14, "causal", GATED),
    "qwen2": (14, "causal", GATED),
    "qwen3": (14, "causal", GATED),
    "mistral": (14, "causal", GATED),
    "gemma": (14, "causal", GATED),
    "gemma2": (14, "causal", GATED),
    "phi3": (8, "causal", []),
    "gpt2": (8, "causal", []),
    "opt": (12, "causal", [QKV]),
    "mpt": (8, "causal", []),
    "neox": (8, "causal", []),
    "t5": (
        32,
        "seq2seq",
        [
            {f"encoder.layer.0.SelfAttention.{x}" for x in "qkv"},
            {f"decoder.layer.0.SelfAttention.{x}" for x in "qkv"},
            {"decoder.layer.1.EncDecAttention.k", "decoder.layer.1.EncDecAttention.v"},
        ],
    ),
    "bert": (12, "masked", [{f"attention.self.{x}" for x in ("query", "key", "value")}]),
    "mixtral": (32, "causal", [QKV, *[{"mlp.experts.w1", "mlp.experts.w3"}] * 4]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_of_the_family(tmp_path: Path, family: str) -> None:
    path = save_checkpoint(tmp_path / "opt" / "q_proj" / family, family)  # a path that names nothing
    checkpoint = open_checkpoint(path)
    found = inspect_architecture(checkpoint)
    count, kind, sharing = EXPECTED[family]
    assert (len(found.targets), found.kind) == (count, kind)
    assert len({target.name for target in found.targets}) == count
    assert {target.index for target in found.targets} == {0, 1}
    groups: dict[str, set[str]] = {}
    for target in found.targets:
        groups.setdefault(target.input_group, set()).add(target.role)
        stored = checkpoint.infos[target.name].shape
        assert target.shape == (stored[::-1] if target.transposed else stored)
        assert target.transposed == (family == "gpt2")
    shared = [roles for roles in groups.values() if len(roles) > 1]
    assert sorted(map(sorted, shared)) == sorted(map(sorted, sharing * 2))


@pytest.mark.parametrize(
    ("family", "stored"), [("mixtral", "one by one"), ("qwen3_moe", "one by one"), ("gpt_oss", "")]
)
def test_every_expert_is_a_matrix_of_the_files_and_a_window_of_a_parameter(
    family: str, stored: str, tmp_path: Path
) -> None:
    model = tiny(family, mappings()["causal"][family])
    model.save_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    found = inspect_architecture(checkpoint)
    parameters = dict(model.named_parameters())
    experts = [target for target in found.targets if not target.window.is_whole]
    assert len(experts) == (2 * 4 * 3 if stored else 2 * 4 * 2)
    assert {target.part is None for target in experts} == {bool(stored)}
    assert sum(target.shape[0] * target.shape[1] for target in experts) == sum(
        value.numel() for name, value in parameters.items() if ".experts." in name and value.ndim == 3
    )
    for target in experts:
        value = target.window.of(parameters[target.parameter])
        assert torch.equal(value, checkpoint.matrix(target))
        assert target.shape == tuple(value.T.shape if target.transposed else value.shape)
        assert target.transposed == (family == "gpt_oss")
        assert target.share == 0.5
    assert any(item.reason == ROUTER for item in found.not_targeted)
    assert not any(item.role.endswith(("gate_up_proj", "down_proj")) for item in found.not_targeted)


def test_names_without_the_base_prefix_are_found(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m", "gpt2")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})  # as the hub's gpt2 is
    found = inspect_architecture(open_checkpoint(path))
    assert found.targets[0].name == "h.0.attn.c_attn.weight"
    assert found.targets[0].parameter == "transformer.h.0.attn.c_attn.weight"


def test_fewer_than_the_architecture_has_is_an_error(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"13 of the 14 .*model.layers.1.mlp.down_proj.weight"):
        inspect_architecture(open_checkpoint(path))


def edit_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def test_wrong_shapes_and_unknown_classes_are_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    edit_config(path, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"shape \[48, 32\], config.json asks for \[40, 32\]"):
        inspect_architecture(open_checkpoint(path))
    edit_config(path, architectures=["NoSuchModel"])
    with pytest.raises(CheckpointError, match="no model class NoSuchModel"):
        inspect_architecture(open_checkpoint(path))
    edit_config(path, architectures=[])
    with pytest.raises(CheckpointError, match='no "architectures"'):
        inspect_architecture(open_checkpoint(path))


def test_patterns_choose_by_name_role_and_last_part(tmp_path: Path) -> None:
    targets = inspect_architecture(open_checkpoint(save_checkpoint(tmp_path / "m"))).targets
    assert len(select_targets(targets, ["q_proj"], [])) == 2
    assert len(select_targets(targets, ["mlp.*"], ["down_proj"])) == 4
    assert len(select_targets(targets, ["*.layers.1.*"], [])) == 7
    with pytest.raises(SettingsError, match="--targets 'q_prj' matches none of the 14 matrices"):
        select_targets(targets, ["q_prj"], [])
    with pytest.raises(SettingsError, match="--exclude 'x' matches none"):
        select_targets(targets, [], ["x"])
    with pytest.raises(SettingsError, match="leave none"):
        select_targets(targets, ["q_proj"], ["*"])


@pytest.mark.parametrize(
    "damage",
    [
        {"hidden_size": "abc"},
        {"hidden_size": -32},
        {"num_hidden_layers": "2"},
        {"rope_parameters": "x"},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": [5]},
        {"architectures": "Llama"},
        {"quantization_config": "gptq"},
    ],
)
def test_damaged_configurations_are_one_line(tmp_path: Path, damage: dict[str, object]) -> None:
    path = save_checkpoint(tmp_path / "m")
    edit_config(path, **damage)
    with pytest.raises(CheckpointError) as caught:
        inspect_architecture(open_checkpoint(path))
    assert "\n" not in str(caught.value)


def test_positions_reserved_for_padding_are_not_offered(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=34
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "m")
    assert inspect_architecture(open_checkpoint(tmp_path / "m")).max_positions == 32
    for family, limit in (("llama", 64), ("gpt2", 64), ("opt", 64), ("t5", None), ("bert", 64)):
        path = save_checkpoint(tmp_path / family, family)
        assert inspect_architecture(open_checkpoint(path)).max_positions == limit
