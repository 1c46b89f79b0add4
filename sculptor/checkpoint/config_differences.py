"""What a configuration says that another does not, as transformers reads both, and as their files stand."""

import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sculptor.checkpoint.configuration import GENERATION_NAME, model_class
from sculptor.checkpoint.declared_dtypes import DTYPE_KEYS, floating_dtypes, inner_dtypes, is_inner, named_dtype
from sculptor.checkpoint.directory import CONFIG_NAME
from sculptor.checkpoint.plain import bytes_of, is_plain
from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import CheckpointError

# Of a configuration, what says nothing of the model.
_FREE = ("transformers_version", "_name_or_path", "use_cache")
MISSING = object()
# Of how to generate, what is either on or not; anything else that is false is a number 0, or an error.
_SWITCHES = frozenset(
    {"output_attentions", "output_hidden_states", "output_logits", "renormalize_logits", "token_healing", "low_memory"}
    | {"disable_compile", "return_legacy_cache"}
)

Configuration = Callable[[Mapping[str, Any]], dict[str, Any]]


def setting_differences(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Settings of a loaded model that are not those of a checkpoint, one line each; what only the model has is no setting of it."""
    read = _as_loaded(checkpoint)
    if isinstance(read, str):
        return []
    # As files have them: numbers as keys are text there.
    before, now = (without(json.loads(json.dumps(each, default=str))) for each in (read, config))
    return [line for line in settings(before, now) if not line.partition(" was ")[2].startswith("not there")]


def config_differences(
    base: Checkpoint, tuned: Checkpoint, changed: Configuration, pad_id: int | None = None
) -> Iterator[str]:
    """How the configuration of `tuned` is not that of its base after a change that is known, a line each.

    Where the base's says nothing of padding, it may say what the tokenizer pads with: trainers write that.
    """
    before, now = changed(base.config), tuned.config
    stored = floating_dtypes(tuned)
    same = all(_is_loaded_as_before(base, tuned, name) for name in base.infos.keys() & tuned.infos.keys())
    # Without a name, the tensors' own is taken.
    allowed = {named_dtype(before)} if same else {None}
    allowed |= stored if len(stored) == 1 else set()
    for dtype in {named_dtype(now, (key,)) for key in DTYPE_KEYS if now.get(key) is not None} or {None}:
        if dtype not in allowed:
            yield f"dtype was {named_dtype(before)}, is {dtype}, and the tensors are not"
    if named_dtype(before) is None and named_dtype(now) is None and len(floating_dtypes(base)) < len(stored):
        yield f"dtype is named nowhere, and the tensors are of {len(stored)}, by one of which all of them are loaded"
    inner: dict[str, set[str | None]] = defaultdict(set)
    for place, dtype in inner_dtypes(before):
        inner[place].add(dtype)
    for place, dtype in inner_dtypes(now):  # saving a configuration fills in the outer one
        if dtype not in allowed | (inner[place] if same else set()):
            yield f"{place}.dtype was {', '.join(map(str, inner[place])) or None}, is {dtype}, and the tensors are not"
    if bytes_of(base.path / CONFIG_NAME) != bytes_of(tuned.path / CONFIG_NAME) and not is_plain(
        tuned.path / CONFIG_NAME
    ):
        yield "is not read alike by every program (a key twice, or another encoding than UTF-8)"
    loaded = [_as_loaded(checkpoint) for checkpoint in (base, tuned)]
    if isinstance(loaded[1], str) and not isinstance(loaded[0], str):
        yield f"transformers does not read it ({loaded[1]})"
        return
    read, read_now = (
        without(of.config if isinstance(found, str) else found) for of, found in zip((base, tuned), loaded, strict=True)
    )
    read = _with_problem(padded(changed(read), read_now, pad_id), read_now)
    yield from settings(read, read_now)
    yield from _unread(without(before), without(now), read, read_now)
    yield from _lost(tuned, without(before), without(now), read_now)
    versions = [config.get("transformers_version") for config in (before, now)]
    if not isinstance(versions[1], str | None):
        yield f"transformers_version is {_short(versions[1])}"
    if versions[0] != versions[1] and _reads_by_version(tuned.path):
        yield f"transformers_version was {versions[0]}, is {versions[1]}, by which this tokenizer is read"


def padded(before: Mapping[str, Any], now: Mapping[str, Any], pad_id: int | None) -> dict[str, Any]:
    """A configuration that says nothing of padding, with what another says if that is what the tokenizer pads with."""
    silent = before.get("pad_token_id") is None and pad_id is not None and now.get("pad_token_id") == pad_id
    return {**before, "pad_token_id": pad_id} if silent else dict(before)


def _with_problem(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A classifier's configuration that leaves open what of several classes are, with what the first labels make of it.

    The model itself writes that down; only of one class of several it says what was meant before.
    """
    told = "single_label_classification"
    silent = before.get("problem_type") is None and now.get("problem_type") == told
    return {**before, "problem_type": told} if silent and len(now.get("id2label") or ()) > 1 else dict(before)


def _is_loaded_as_before(base: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    """Whether the dtype that a base is loaded in gives a tensor's values back: saving keeps some, routers and such, in float32."""
    before, now = base.infos[name], tuned.infos[name]
    if before.dtype == now.dtype:
        return True
    widened = before.shape == now.shape and torch.promote_types(before.dtype, now.dtype) == now.dtype
    return widened and torch.equal(base[name].to(now.dtype), tuned[name])


def _unread(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    read: Mapping[str, Any],
    read_now: Mapping[str, Any],
    place: str = "",
) -> Iterator[str]:
    """Keys of the file that the configuration's class drops and others read: attention, generation. None may be new."""
    for key, value in sorted(now.items()):
        name = f"{place}.{key}" if place else key
        if is_inner(key, value):
            old, its, first, second = (
                inner if isinstance(inner := each.get(key), dict) else {} for each in (before, now, read, read_now)
            )
            yield from _unread(old, its, first, second, name)
        elif key not in read_now or key not in read:
            known = before.get(key, MISSING)
            if known is MISSING and key in read:  # what was its default stands in the file now
                continue
            yield from settings(known, value, name)


def _lost(
    tuned: Checkpoint, before: Mapping[str, Any], now: Mapping[str, Any], read: Mapping[str, Any]
) -> Iterator[str]:
    """Keys that generation reads in the base's file, where it has none of its own; saving a configuration drops them."""
    from transformers import GenerationConfig

    if (tuned.path / GENERATION_NAME).is_file() or not generates(tuned):
        return
    defaults = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params()
    for key in sorted(before.keys() & defaults.keys() - now.keys() - read.keys()):
        if before[key] is not None and before[key] != defaults[key]:
            yield from settings(before[key], MISSING, key)


def generates(checkpoint: Checkpoint) -> bool:
    """Whether its class does; one that is not known may."""
    try:
        return bool(model_class(checkpoint.config, checkpoint.path).can_generate())
    except CheckpointError:
        return True


def is_derived(base: Checkpoint, tuned: Checkpoint, pad_id: int | None) -> bool:
    """Whether how to generate, of which the base has no file, is what loading makes of its configuration: saving writes that.

    It may pad with `pad_id`, as `config_differences` has it.
    """
    from transformers import AutoConfig, GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    switches = _SWITCHES | {key for key, value in defaults.items() if isinstance(value, bool)}

    def said(made: Any) -> dict[str, Any]:
        kept = without(made.to_dict(), ("transformers_version", "_from_model_config", "use_cache"))
        return {key: None if value is False and key in switches else value for key, value in kept.items()}

    try:
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
        file = GenerationConfig.from_pretrained(base.path, CONFIG_NAME, _from_model_config=True, local_files_only=True)
        now = said(GenerationConfig.from_pretrained(tuned.path, local_files_only=True))
    except Exception:  # it raises what it likes
        return False
    made = (padded(said(each), now, pad_id) for each in (GenerationConfig.from_model_config(config), file))
    return any(not list(settings(each, now, numbers=True)) for each in made)


def _reads_by_version(path: Path) -> bool:
    """Whether a tokenizer asks which version of transformers wrote the model."""
    try:
        found = json.loads((path / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found.get("fix_mistral_regex"))


def _as_loaded(checkpoint: Checkpoint) -> Mapping[str, Any] | str:
    """A configuration with its defaults, as transformers reads it: saving it anew writes other keys of the same meaning.

    Why it does not, where this transformers has no such class, or the configuration breaks it.
    """
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=False, local_files_only=True
        ).to_dict()
    except Exception as cause:  # it raises what it likes
        return " ".join(str(cause).split())[:120] or type(cause).__name__
    # What is no setting of the class is kept by it; code is named in the file alone.
    return found | {key: checkpoint.config[key] for key in ("auto_map", "architectures") if key in checkpoint.config}


def without(config: Mapping[str, Any], free: Container[str] = (*_FREE, *DTYPE_KEYS)) -> dict[str, Any]:
    """A configuration, and those in it, without what may differ; an inner dtype gives way to the outer one."""
    kept = {key: value for key, value in config.items() if key not in free}
    for key, value in kept.items():
        if is_inner(key, value):
            kept[key] = without(value, DTYPE_KEYS)
        elif isinstance(value, dict) and key == "id2label":  # numbers, which files have as texts
            kept[key] = {str(number): name for number, name in value.items()}
    return kept


def settings(before: Any, now: Any, place: str = "", numbers: bool = False) -> Iterator[str]:
    """Names of settings that differ, with both values; null is not the same as nothing, nor true as 1, with `numbers` nor 1.0."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            inner = f"{place}.{key}" if place else key
            yield from settings(before.get(key, MISSING), now.get(key, MISSING), inner, numbers)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from settings(old, new, f"{place}[{i}]", numbers)
    elif (
        isinstance(before, bool) != isinstance(now, bool)
        or before != now
        or (numbers and type(before) is not type(now))
    ):
        yield f"{place} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = "not there" if value is MISSING else ascii(value)
    return text if len(text) <= 60 else text[:59] + "…"
