"""How many rows go through a model at a time, where nobody says."""

import inspect

import torch

from sculptor.model.head import find_head
from sculptor.model.load import LoadedModel

# Before a model is loaded: what is planned for.
PLANNED_ROWS = 16
# On a CPU more rows at a time gain nothing; on a GPU small models wait for their launches.
_ROWS = {"cpu": PLANNED_ROWS}
_MOST = 256
# Of keys and values, and of a copy of them; a GPU that the model fills has less.
_ROOM, _SHARE = 16e9, 0.25


def cache_bytes(loaded: LoadedModel) -> float:
    """Keys and values of a token, in all layers, as far as a model's configuration says."""
    config = loaded.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    kept = getattr(config, "num_key_value_heads", None)
    share = kept / heads if isinstance(kept, int) and isinstance(heads, int) and 0 < kept < heads else 1.0
    layers = getattr(config, "num_hidden_layers", None) or len({target.block for target in loaded.architecture.targets})
    table = loaded.model.get_input_embeddings().weight
    return share * 2 * layers * int(table.shape[1]) * int(table.element_size())


def rows_at_once(loaded: LoadedModel, length: int) -> int:
    """Rows of up to `length` tokens that are evaluated in a forward; the same on every run of a machine."""
    if loaded.device.type in _ROWS:
        return _ROWS[loaded.device.type]
    held = sum(value.nbytes for value in loaded.model.parameters())
    left = torch.cuda.get_device_properties(loaded.device).total_memory - held
    heads = loaded.architecture.heads if loaded.architecture.writes_scores else 0
    per_token = cache_bytes(loaded) + (6 * loaded.architecture.vocab_size if _makes_all_logits(loaded) else 0)
    return rows_within(min(_ROOM, _SHARE * max(0, left)), per_token, length, heads)


def _makes_all_logits(loaded: LoadedModel) -> bool:
    """Whether logits of every token are made, in the model's precision and in float32."""
    if loaded.kind == "classifier":  # a few for each row
        return False
    accepted = inspect.signature(loaded.model.forward).parameters
    return "logits_to_keep" not in accepted or find_head(loaded.model, loaded.kind) is None


def rows_within(room: float, per_token: float, length: int, heads: int) -> int:
    """How many rows keep to some bytes.

    Args:
        room: bytes.
        per_token: of a token, whatever the row's length.
        length: of a row, in tokens.
        heads: whose scores are written out, a number for each two tokens, in its own precision and in float32; 0 for none.
    """
    return max(1, min(_MOST, int(room / (length * (per_token + 6 * heads * length)))))
