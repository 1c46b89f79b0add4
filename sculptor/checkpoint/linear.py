"""Which modules are plain linear maps, and what else a model's own modules say of its sizes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import CheckpointError


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear map: a router may be a subclass that gives more than a tensor."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | Conv1D):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    try:
        width = module.weight.shape[1 if isinstance(module, nn.Linear) else 0]
        return isinstance(module(torch.zeros(1, 1, width, device=module.weight.device)), torch.Tensor)
    except Exception:  # it takes more than one input
        return False


def linear_maps(blocks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Module path -> path of its block."""
    return {
        f"{block}.{path}": block
        for block, module in blocks.items()
        for path, child in module.named_modules()
        if path and is_linear(child)
    }


def vocab_size(checkpoint: Checkpoint, skeleton: Any) -> int:
    try:
        return int(skeleton.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError) as cause:  # it sees pictures, or has several entrances
        raise CheckpointError(
            f"{checkpoint.path}: {type(skeleton).__name__} has no embedding of tokens; expected a language model"
        ) from cause


def max_positions(skeleton: Any) -> int | None:
    """What the configuration says, less what a table of positions reserves for padding (RoBERTa)."""
    config = skeleton.config
    if hasattr(config, "relative_attention_num_buckets"):  # T5
        return None
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT
    if not isinstance(limit, int) or limit <= 0:  # XLNet says -1
        return None
    for name, module in skeleton.named_modules():
        reserved = getattr(module, "padding_idx", None)
        if "position" in name and isinstance(module, nn.Embedding) and reserved is not None:
            limit = min(limit, module.num_embeddings - reserved - 1)
    return limit
