"""Which tensors of a checkpoint are linear maps of its repeated blocks, found from the model's own modules.

The model is built on the meta device (no memory), its blocks are the modules that transformers itself marks
for gradient checkpointing (else the outermost lists of modules), and names in the file are matched to modules
by transformers' own loading rules. Nothing is ever matched against the path of the checkpoint.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sculptor.checkpoint.configuration import load_config, model_class, reason_of
from sculptor.checkpoint.directory import wrapper_hint
from sculptor.checkpoint.experts import StackedParameter, expert_role, find_routers, find_stacked, find_windows
from sculptor.checkpoint.kinds import ModelKind as ModelKind
from sculptor.checkpoint.kinds import kind_of
from sculptor.checkpoint.linear import linear_maps, max_positions, vocab_size
from sculptor.checkpoint.names import Origins
from sculptor.checkpoint.reader import Checkpoint, part_name
from sculptor.checkpoint.sharing import input_leaders, reached_parameters
from sculptor.checkpoint.windows import WHOLE, Window
from sculptor.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Target:
    """One linear map of a repeated block: a tensor of the checkpoint, or a slice of one (an expert of several, stacked).

    Attributes:
        name: what it is called everywhere: the tensor, with `[part]` behind it for a slice.
        tensor: the tensor in the checkpoint; `part` which slice of its first dimension, None for all of it.
        parameter: the parameter of the model that it is loaded into.
        block: path of the block in the model.
        index: position of the block in its stack.
        role: path inside the block, preceded by the stack where the model has several.
        shape: (m, n) = (out, in), whatever the orientation.
        transposed: stored as (in, out), as GPT-2's Conv1D does.
        input_group: the same for matrices that read the same input.
        window: where in the parameter it is.
        share: of the tokens, how many reach it on average.
    """

    tensor: str
    parameter: str
    block: str
    index: int
    role: str
    shape: tuple[int, int]
    transposed: bool
    input_group: str
    part: int | None = None
    window: Window = WHOLE
    share: float = 1.0

    @property
    def name(self) -> str:
        """What it is called."""
        return part_name(self.tensor, self.part)

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def width(self) -> float:
        """Numbers that a token reads and writes there, on average."""
        return sum(self.shape) * self.share


@dataclass(frozen=True, slots=True)
class NotTargeted:
    """Matrices below a numbered path that no rule is for, and why; they stay frozen."""

    role: str
    num_tensors: int
    num_parameters: int
    reason: str


NO_LINEAR_MAP = "no plain linear map"
NO_TEXT = "no text reaches it"
OUTSIDE = "outside of the repeated blocks"
NO_ROW = "no calibration row reaches it"
SHARED = "one weight of several modules"
CONVERTED = "split or joined when it is loaded"
ROUTER = "it sends tokens to experts"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a checkpoint's own modules say of it.

    Attributes:
        model_class: name of the transformers class.
        kind: how it is trained.
        targets: in the order of the model.
        not_targeted: what else has two or more dimensions inside the blocks.
        tensors: parameter (or buffer) of the model -> tensor of the checkpoint.
        parameters: those of them that can be trained.
        max_positions: longest sequence its positions allow, None where they have no limit.
        vocab_size: ids it has embeddings for.
        classes: of a classifier, names by number.
        heads: of its attention; `writes_scores` whether their scores are written out, a number for each two tokens of a row.
    """

    model_class: str
    kind: ModelKind
    targets: tuple[Target, ...]
    not_targeted: tuple[NotTargeted, ...]
    tensors: Mapping[str, str]
    parameters: frozenset[str]
    max_positions: int | None
    vocab_size: int
    classes: tuple[str, ...] = ()
    heads: int = 0
    writes_scores: bool = False


def build_skeleton(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model on the meta device: modules and shapes, no data."""
    from transformers import PreTrainedModel

    cls = model_class(checkpoint.config, checkpoint.path)
    if not issubclass(cls, PreTrainedModel):
        raise CheckpointError(f'{checkpoint.path}: "architectures" names {cls.__name__}, which is not a model class')
    return build_model(cls, load_config(checkpoint), checkpoint)


def build_model(cls: Any, config: Any, checkpoint: Checkpoint) -> Any:
    """A model of some class on the meta device, by a configuration; the checkpoint is for messages."""
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            return cls(config).eval()
    except Exception as cause:  # a configuration can break model code in any way it likes
        raise CheckpointError(
            f"{checkpoint.path}: config.json does not build a {cls.__name__} ({reason_of(cause)})"
        ) from cause


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, outermost ones only, in the order of the model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    if not blocks:
        lists: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
        }
        for name, module in _outermost(lists).items():
            blocks |= {f"{name}.{path}": child for path, child in module.named_children()}
    return _outermost(blocks)


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in modules.items()
        if not any(name.startswith(other + ".") for other in modules if other != name)
    }


_known: dict[tuple[object, ...], Architecture] = {}
_KNOWN = 8  # a command opens its checkpoint several times, and building the skeleton of a large one takes seconds


def inspect_architecture(checkpoint: Checkpoint) -> Architecture:
    """Targets of a checkpoint, checked against what its files hold.

    Raises:
        CheckpointError: if the model cannot be built, has no targets, or the files lack some of them.
    """
    asked = checkpoint.attn_implementation
    key = (
        json.dumps(checkpoint.config),
        asked,
        *((name, info.dtype, info.shape) for name, info in checkpoint.infos.items()),
    )
    if key not in _known:
        if len(_known) >= _KNOWN:
            _known.pop(next(iter(_known)))
        _known[key] = _inspect(checkpoint)
    return _known[key]


def _inspect(checkpoint: Checkpoint) -> Architecture:
    skeleton = build_skeleton(checkpoint)
    blocks = find_blocks(skeleton)
    origins = Origins.of(skeleton, {name: info.shape for name, info in checkpoint.infos.items()})
    tensors, stacked = origins.tensors, find_stacked(blocks)
    reasons = _reasons(skeleton, linear_maps(blocks), stacked, origins)
    linear = {module: block for module, block in linear_maps(blocks).items() if module not in reasons}
    stacks = {name.rpartition(".")[0] for name in blocks}
    experts = [target for found in stacked.values() for target in _expert_targets(found, origins, len(stacks) > 1)]
    if not linear and not experts:
        raise CheckpointError(f"{checkpoint.path}: {type(skeleton).__name__} has no linear maps in repeated blocks")
    missing = [f"{module}.weight" for module in linear if f"{module}.weight" not in tensors]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: the files hold {len(linear) - len(missing)} of the {len(linear)} matrices that "
            f"{type(skeleton).__name__} has; first missing {missing[0]}{wrapper_hint(checkpoint)}"
        )
    leaders = input_leaders(skeleton, linear)
    maps = [_target(skeleton, module, block, tensors, leaders, len(stacks) > 1) for module, block in linear.items()]
    order = {block: i for i, block in enumerate(blocks)}
    kind = kind_of(skeleton)
    targets = tuple(sorted([*maps, *experts], key=lambda target: order[target.block]))
    _check_shapes(checkpoint, targets)
    return Architecture(
        model_class=type(skeleton).__name__,
        kind=kind,
        targets=targets,
        not_targeted=_not_targeted(skeleton, blocks, {target.parameter for target in targets}, reasons),
        tensors=tensors,
        parameters=frozenset(name for name, _ in skeleton.named_parameters(remove_duplicate=False)),
        max_positions=max_positions(skeleton),
        vocab_size=vocab_size(checkpoint, skeleton),
        classes=tuple(skeleton.config.id2label.values()) if kind == "classifier" else (),
        heads=int(getattr(skeleton.config.get_text_config(), "num_attention_heads", 0) or 0),
        # As transformers chooses: its own kernels where a model has them, unless it is told otherwise.
        writes_scores=not skeleton._supports_sdpa or checkpoint.attn_implementation == "eager",
    )


def role_of(module: str, block: str, several_stacks: bool) -> str:
    """Path inside the block, preceded by the stack where the model has several."""
    path = module.removeprefix(block + ".")
    if not several_stacks:
        return path
    stack = [part for part in block.split(".")[:-1] if "coder" in part] or [block.rpartition(".")[0]]
    return f"{stack[0]}.{path}"


def _target(
    skeleton: nn.Module, module: str, block: str, tensors: Mapping[str, str], leaders: Mapping[str, str], several: bool
) -> Target:
    child = skeleton.get_submodule(module)
    transposed = not isinstance(child, nn.Linear)
    rows, columns = child.weight.shape  # type: ignore[misc]
    shape = (int(columns), int(rows)) if transposed else (int(rows), int(columns))
    index = block.rpartition(".")[2]
    return Target(
        tensor=tensors[f"{module}.weight"],
        parameter=f"{module}.weight",
        block=block,
        index=int(index) if index.isdigit() else 0,
        role=role_of(module, block, several),
        shape=shape,
        transposed=transposed,
        input_group=leaders[module],
    )


def _expert_targets(stacked: StackedParameter, origins: Origins, several: bool) -> list[Target]:
    """The matrices of a stack of experts."""
    index = stacked.block.rpartition(".")[2]
    return [
        Target(
            tensor=found.tensor,
            parameter=stacked.name,
            block=stacked.block,
            index=int(index) if index.isdigit() else 0,
            role=role_of(expert_role(stacked.name, found.tensor, window), stacked.block, several),
            shape=window.shape(stacked.shape),
            transposed=stacked.transposed,
            input_group=part_name(stacked.name, window.part),
            part=found.part,
            window=window,
            share=stacked.share,
        )
        for found, window in find_windows(stacked, origins).items()
    ]


def _check_shapes(checkpoint: Checkpoint, targets: Sequence[Target]) -> None:
    for target in targets:
        info = checkpoint.info_of(target)
        expected = target.shape[::-1] if target.transposed else target.shape
        if info.shape != expected:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {target.name} has shape {list(info.shape)}, config.json asks for {list(expected)}"
            )
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{checkpoint.path}: tensor {target.name} holds integers; expected floating point")


def _reasons(
    skeleton: nn.Module,
    linear: Mapping[str, str],
    stacked: Mapping[str, StackedParameter],
    origins: Origins,
) -> dict[str, str]:
    """Modules and stacks of experts that no rule can be for, and why."""
    reached = reached_parameters(skeleton)
    owners: dict[int, set[int]] = defaultdict(set)
    for module in linear:
        child = skeleton.get_submodule(module)
        owners[id(child.weight)].add(id(child))
    found = {name.removesuffix(".weight"): ROUTER for name in find_routers(skeleton, stacked)}
    found |= {name: CONVERTED for name in stacked if name in origins.converted}
    for module in linear:
        name = f"{module}.weight"
        if module in found:
            continue
        if len(owners[id(skeleton.get_submodule(module).weight)]) > 1:
            found[module] = SHARED
        elif name not in origins.tensors and name in origins.converted:
            found[module] = CONVERTED
        elif reached is not None and name not in reached:
            found[module] = NO_TEXT
    return found


def _not_targeted(
    skeleton: nn.Module, blocks: Mapping[str, nn.Module], targeted: set[str], reasons: Mapping[str, str]
) -> tuple[NotTargeted, ...]:
    """Everything else of two and more dimensions below a numbered path, with its reason."""
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
    seen = set()
    for path, parameter in skeleton.named_parameters():
        module = path.removesuffix(".weight")
        if parameter.ndim < 2 or path in targeted or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        block = next((name for name in blocks if path.startswith(name + ".")), None)
        if module in reasons:
            sizes[general_path(path), reasons[module]].append(parameter.numel())
        elif block is not None:
            sizes[path.removeprefix(block + "."), NO_LINEAR_MAP].append(parameter.numel())
        elif any(part.isdigit() for part in path.split(".")):
            sizes[general_path(path), OUTSIDE].append(parameter.numel())
    return tuple(NotTargeted(role, len(counts), sum(counts), reason) for (role, reason), counts in sizes.items())


def general_path(path: str) -> str:
    """A path with a star for every number."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
