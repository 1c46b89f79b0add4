"""A LoRA adapter as PEFT saves it, read as the checkpoint that merging it into its base would give.

    W = W0 + s B A,    s = alpha / r, or alpha / sqrt(r) with `use_rslora`

W is float64, rounded by whoever stores it. What PEFT can do beyond that (DoRA, biases, trained tokens, other kinds of
adapters) is refused by name: a setting that is not known here has to be empty.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.directory import INDEX_NAME, SINGLE_NAME
from sculptor.checkpoint.places import Place
from sculptor.checkpoint.reader import Checkpoint, Sliced
from sculptor.checkpoint.tensors import read_header, read_known
from sculptor.errors import CheckpointError
from sculptor.numerics.finite import is_finite
from sculptor.validation import Finite, parse, read_file, read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.(?:lora_(?P<a>[AB])\.weight|lora_embedding_(?P<b>[AB]))")
# Says nothing of what is in the file, or only with another setting.
_IDLE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "lora_dropout",
        "modules_to_save", "runtime_config",
        "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    }
)  # fmt: skip
# Starts that leave the base's own weights as they are.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REMEDY = "save the adapter again with PEFT"


@dataclass(frozen=True, slots=True)
class _Config:
    """Of adapter_config.json, what decides the weights."""

    peft_type: str
    r: int
    lora_alpha: Finite
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, Finite] | None = None
    fan_in_fan_out: bool = False  # as the module stores its weight, which the model says by itself
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None

    def leaves_out(self, module: str) -> str | None:
        """The setting by which PEFT passes by a module of the model, if there is one."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return "exclude_modules"
        if self.target_modules and self.target_modules != "all-linear" and not _names(self.target_modules, module):
            return "target_modules"
        layers = self.layers_to_transform
        if layers is None or layers == ():
            return None
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern or ("[^.]*",)
        found = (re.match(rf".*?\.{pattern}\.(\d+)\.", module) for pattern in patterns)
        number = next(filter(None, found), None)  # the first of a path, as PEFT has it
        wanted = layers if isinstance(layers, tuple) else (layers,)
        return "layers_to_transform" if number and int(number[1]) not in wanted else None

    def rank(self, module: str) -> int:
        """r of a module of the model."""
        return int(_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """s of a module of the model."""
        rank = self.rank(module)
        alpha = _pattern(self.alpha_pattern, module, self.lora_alpha)
        return float(alpha / rank**0.5 if self.use_rslora else alpha / rank)


def _names(modules: str | tuple[str, ...], module: str) -> bool:
    """Whether PEFT takes a module to be meant: by a pattern for all of its path, or by the ends of paths."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in modules)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's path, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


class Adapter(Mapping[str, Tensor]):
    """The tensors of its base that an adapter changes, by their names there: each as it is after a merge.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors.
        base: the checkpoint that it belongs to.
        places: of the base's tensors.

    Raises:
        CheckpointError: if it is damaged, of a kind that is not supported, or does not fit the base.
    """

    def __init__(self, path: Path, base: Checkpoint, places: Mapping[str, Place]) -> None:
        self.path, self.base = path, base
        self.config = _read_config(path)
        self.infos, _ = read_header(path / WEIGHTS_NAME, CheckpointError)
        owners = {
            parameter: (tensor, place)
            for tensor, place in places.items()
            if place.whole
            for parameter in (place.parameter, *place.tied)
        }
        self._pairs: dict[str, dict[str, str]] = defaultdict(dict)  # tensor of the base -> A, B
        self._saved: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        self._places = places
        for key in self.infos:
            self._note(key, owners)
        if not self.infos:
            raise CheckpointError(f"{path}: the adapter holds no tensor; {_REMEDY}")
        self._check_shapes()

    def _note(self, key: str, owners: Mapping[str, tuple[str, Place]]) -> None:
        """Finds out what a tensor of the adapter is."""
        path = key.removeprefix(_PREFIX)
        found = _PART.fullmatch(path)
        if found is None and "lora_" in path:
            raise CheckpointError(f"{self.path}: tensor {key} is of no plain LoRA, which is all that is supported")
        module = found["module"] if found else path.removesuffix(".weight").removesuffix(".base_layer")
        parameter = f"{module}.weight" if found or path.endswith(".weight") else path
        if parameter not in owners:
            raise CheckpointError(
                f"{self.path}: tensor {key} is for {parameter}, which {self.base.path} does not have as one tensor; "
                "is it the adapter's base?"
            )
        tensor, place = owners[parameter]
        if place.tied:
            raise CheckpointError(
                f"{self.path}: tensor {key} is for {parameter}, which is tied to another parameter; merge it with PEFT"
            )
        if found and (setting := self.config.leaves_out(module)) is not None:
            raise CheckpointError(
                f"{self.path}: tensor {key} is of a module that {CONFIG_NAME} leaves out ({setting}): PEFT does not apply it; "
                f"{_REMEDY}"
            )
        if found:
            self._pairs[tensor][found["a"] or found["b"]] = key
            self._modules[tensor] = module
        else:
            self._saved[tensor] = key

    def _check_shapes(self) -> None:
        for tensor, pair in self._pairs.items():
            lacking = sorted({"A", "B"} - set(pair))
            if lacking:
                raise CheckpointError(f"{self.path}: no {lacking[0]} for {self._modules[tensor]}; {_REMEDY}")
            a, b = (self.infos[pair[side]].shape for side in "AB")
            expected, rank = self.base.infos[tensor].shape, self.config.rank(self._modules[tensor])
            shape = (a[-1], b[0]) if self._is_turned(tensor) else (b[0], a[-1])
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or shape != expected:
                raise CheckpointError(
                    f"{self.path}: {pair['A']} {list(a)} and {pair['B']} {list(b)} do not make a change of {tensor} "
                    f"{list(expected)}; is {self.base.path} the adapter's base?"
                )
            if a[0] != rank:
                raise CheckpointError(
                    f"{self.path}: {pair['A']} is of rank {a[0]}, by {CONFIG_NAME} of {rank}, which decides the scale; {_REMEDY}"
                )
        for tensor, key in self._saved.items():
            if self.infos[key].shape != self.base.infos[tensor].shape:
                raise CheckpointError(
                    f"{self.path}: {key} has shape {list(self.infos[key].shape)}, {tensor} of {self.base.path} "
                    f"{list(self.base.infos[tensor].shape)}"
                )

    def _is_turned(self, tensor: str) -> bool:
        """Whether the base stores (in, out): Conv1D, and embeddings, which are read row by row."""
        return self._places[tensor].transposed or "embedding" in self._pairs[tensor]["A"].rpartition(".")[2]

    def __getitem__(self, name: str) -> Tensor:
        """A tensor after the merge, float64.

        Raises:
            CheckpointError: if the adapter holds NaN or infinite values.
        """
        if name not in self._saved and name not in self._pairs:
            raise KeyError(name)
        found = self._read(self._saved[name]) if name in self._saved else self.base[name].to(torch.float64)
        if name in self._pairs:
            a, b = (self._read(self._pairs[name][side]) for side in "AB")
            change = self.config.scale(self._modules[name]) * (b @ a)
            found = found + (change.T if self._is_turned(name) else change)
        return found

    def finite_matrix(self, at: Sliced) -> Tensor:
        """As `Checkpoint.finite_matrix`, float64; what the adapter does not change is the base's."""
        if at.tensor not in self:
            return self.base.finite_matrix(at)
        found = self[at.tensor]
        return found if at.part is None else found[at.part]

    def _read(self, key: str) -> Tensor:
        value = read_known(self.path / WEIGHTS_NAME, key, self.infos[key], CheckpointError).to(torch.float64)
        if not is_finite(value):
            raise CheckpointError(f"{self.path}: tensor {key} has NaN or infinite values; use an earlier adapter")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._pairs, *self._saved]))

    def __len__(self) -> int:
        return len(set(self._pairs) | set(self._saved))


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no full model."""
    return (path / CONFIG_NAME).is_file() and not any((path / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def _read_config(path: Path) -> _Config:
    file = path / CONFIG_NAME
    content = parse(read_file(file, CheckpointError, _REMEDY), file, CheckpointError, _REMEDY)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type {kind!r} is not supported; expected 'LORA'")
    known = {field.name for field in fields(_Config)}
    _refuse(file, ((key, value) for key, value in content.items() if key not in known | _IDLE))
    used = json.dumps({key: content[key] for key in known & content.keys()})
    config = read_json(_Config, used, file, CheckpointError, _REMEDY)
    if config.bias != "none":
        raise CheckpointError(f"{file}: bias {config.bias!r} is not supported; merge the adapter with PEFT")
    if config.init_lora_weights not in _STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights {config.init_lora_weights!r} changes the base's own weights; convert the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    if min([config.r, *(config.rank_pattern or {}).values()]) < 1:
        raise CheckpointError(f"{file}: a rank below 1; {_REMEDY}")
    told = config.layers_pattern or ()
    regular = [each for each in (config.target_modules, config.exclude_modules) if isinstance(each, str)]
    regular += [told] if isinstance(told, str) else told
    for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {}), *regular):
        try:
            re.compile(pattern)
        except re.error as cause:
            raise CheckpointError(f"{file}: {pattern!r} is no pattern ({cause}); {_REMEDY}") from None
    if not (path / WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{path}: no {WEIGHTS_NAME}; only safetensors is read: {_REMEDY}")
    return config


def _refuse(file: Path, settings: Iterable[tuple[str, Any]]) -> None:
    """Refuses what is switched on and not known here."""
    for key, value in settings:
        if value not in (None, False, [], {}, ""):
            raise CheckpointError(
                f"{file}: {key} is not supported (found {str(value)[:60]}); merge the adapter with PEFT"
            )
