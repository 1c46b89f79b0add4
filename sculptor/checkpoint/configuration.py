"""The configuration and the class of a checkpoint's model, for every way of building it."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import CheckpointError, SettingsError
from sculptor.validation import parse, read_file

# Settings that say how many modules there are.
_COUNT = re.compile(r"(num|^n)_.*(layers?|experts?|blocks?)$|layers$|^depths?$")


def model_class(config: Mapping[str, Any], path: object) -> type[Any]:
    """The transformers class that `config.architectures` names.

    Raises:
        CheckpointError: if it names none, or one that this transformers does not have.
    """
    import transformers

    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f'{path}: "architectures" in config.json is not a list of names')
    if not names:
        raise CheckpointError(f'{path}: config.json has no "architectures"; add the name of the model class')
    cls = getattr(transformers, names[0], None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        if config.get("auto_map"):
            raise CheckpointError(f"{path}: needs custom code (auto_map in config.json), which sculptor does not run")
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} has no model class {names[0]}; upgrade it or check config.json"
        )
    found: type[Any] = cls
    return found


GENERATION_NAME = "generation_config.json"


def generation_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a checkpoint says of generation in its own file; nothing without one.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = checkpoint.path / GENERATION_NAME
    if not path.is_file():
        return {}
    return parse(read_file(path, CheckpointError, "restore it"), path, CheckpointError, "restore it")


def stop_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Tokens at which generation stops, as the checkpoint says."""
    text = checkpoint.config.get("text_config")
    places = [generation_settings(checkpoint), checkpoint.config, text if isinstance(text, dict) else {}]
    said: Any = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), [])
    return tuple(token for token in (said if isinstance(said, list) else [said]) if type(token) is int)


def load_config(checkpoint: Checkpoint) -> Any:
    """The configuration as transformers reads it, without code from the directory, for every way of building the model.

    Attention that this machine may not have, such as flash attention, is left to transformers' own choice. What it keeps of
    states is off, in inner configurations too: the loss needs none.

    Raises:
        CheckpointError: if it asks for more layers than the files can hold, or transformers does not know it.
    """
    from transformers import AutoConfig, PreTrainedConfig

    _check_counts(checkpoint, checkpoint.config)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except Exception as cause:  # a configuration can break its class in any way it likes
        if checkpoint.config.get("auto_map"):
            raise CheckpointError(
                f"{checkpoint.path}: needs custom code (auto_map in config.json), which sculptor does not run"
            ) from cause
        raise CheckpointError(f"{checkpoint.path}: config.json is not usable ({reason_of(cause)})") from cause
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        if part._attn_implementation not in (None, "eager", "sdpa"):
            part._attn_implementation = None
        for switch in ("use_cache", "output_attentions", "output_hidden_states"):
            if getattr(part, switch, False):
                setattr(part, switch, False)
    if checkpoint.attn_implementation is not None:
        config._attn_implementation = checkpoint.attn_implementation
    return config


def check_attention(checkpoint: Checkpoint) -> None:
    """Asks the model whether it has the attention that was chosen, without weights and before any work.

    Raises:
        SettingsError: if it has not, or this machine has not.
    """
    name = checkpoint.attn_implementation
    if name is None:
        return
    config = load_config(checkpoint)
    try:
        with torch.device("meta"):
            model_class(checkpoint.config, checkpoint.path)(config)
    except Exception as cause:  # of transformers, and of packages that it asks for
        reason = reason_of(cause).replace("`", "").replace('attn_implementation="', '"')
        raise SettingsError(f"--attn-implementation {name}: not to be had for this model ({reason})") from cause


def reason_of(cause: BaseException, limit: int = 200) -> str:
    """What an exception of another library says, in one short line."""
    text = " ".join(str(cause).split())
    if len(text) < 12:  # the bare key of a KeyError says nothing
        text = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _check_counts(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuses counts of layers or experts that would take minutes to build and cannot be in the files."""
    limit = max(1024, len(checkpoint))
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(checkpoint, value)
        elif _COUNT.search(key) and isinstance(value, int) and value > limit:
            raise CheckpointError(
                f"{checkpoint.path}: config.json says {key} {value}, and the files hold {len(checkpoint)} tensors"
            )
