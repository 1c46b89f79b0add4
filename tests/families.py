"""Tiny random models of every family that transformers can build small, by one set of sizes.

`tiny(model_type)` gives a model; sizes are set where a configuration has them, so that a new family needs no entry here
unless its sizes depend on each other.
"""

from collections.abc import Mapping
from typing import Any

import torch

SIZES: Mapping[str, int] = {
    **dict.fromkeys(("vocab_size", "lm_head_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "emb_dim", "word_embed_proj_dim",
         "embedding_size"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
         "feed_forward_size"), 48
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size", "shared_intermediate_size"), 24
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
         "num_encoder_layers"), 2
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_seq_length"), 64
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "type_vocab_size"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "mamba_n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(
        ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "state_size", "mamba_d_state", "linear_key_head_dim",
         "linear_value_head_dim", "hidden_size_per_layer_input", "attention_window"), 8
    ),
    **dict.fromkeys(
        ("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "mamba_d_conv", "time_step_rank", "conv_kernel"), 4
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_expand"), 2),
    "sliding_window": 32, "num_kv_shared_layers": 0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": 1,
}  # fmt: skip
# Set even where the default is None.
_UNSET = ("head_dim", "num_key_value_heads", "n_inner", "pad_token_id", "decoder_start_token_id")
# Sizes that depend on each other.
OWN: Mapping[str, Mapping[str, Any]] = {
    "mamba2": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": None},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "bert": {"is_decoder": False},
    "deepseek_v4": {"o_lora_rank": 8},
}


def mappings() -> dict[str, dict[str, str]]:
    """Classes of transformers by kind and model type."""
    from transformers.models.auto import modeling_auto

    return {
        "causal": dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "seq2seq": dict(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        "masked": dict(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    }


def tiny_config(model_type: str) -> Any:
    """A configuration of a few thousand weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    chosen = {
        name: value for name, value in SIZES.items() if name in known and (known[name] is not None or name in _UNSET)
    }
    if "kv_lora_rank" in known or "rotary_dim" in known:  # latent attention has no groups; rotary parts of heads
        chosen |= {name: value for name, value in {"num_key_value_heads": 4, "rotary_dim": 8}.items() if name in known}
    return config_class(**(chosen | dict(OWN.get(model_type, {}))))


def tiny(model_type: str, class_name: str, limit: int = 3_000_000) -> Any:
    """A random model in float32.

    Raises:
        ValueError: if the sizes leave it too large.
    """
    import transformers

    config = tiny_config(model_type)
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > limit:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the tiny defaults, so that updates and rounding are real
            if parameter.ndim >= 2 and float(parameter.abs().max()) < 0.2:
                parameter.mul_(4)
    return model


# Families that the tests run through everything, by kind.
SUPPORTED: Mapping[str, tuple[str, ...]] = {
    "causal": (
        "apertus", "arcee", "bamba", "bart", "bloom", "cohere", "cohere2", "deepseek_v3", "deepseek_v4", "diffllama", "ernie4_5",
        "exaone4", "falcon", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4",
        "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "granite", "granitemoe", "helium",
        "hunyuan_v1_dense", "internlm3", "jamba", "jetmoe", "lfm2", "llama", "mamba", "mamba2", "ministral", "mistral",
        "mixtral", "mpt", "nemotron", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2_moe", "qwen3", "qwen3_moe",
        "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2",
    ),
    "seq2seq": (
        "bart", "led", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5",
    ),
    "masked": (
        "albert", "bert", "deberta-v2", "distilbert", "electra", "flaubert", "modernbert", "mpnet", "roberta", "xlm",
        "xlm-roberta",
    ),
}  # fmt: skip
