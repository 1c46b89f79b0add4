"""A transformers model whose blocks are streamed, made from the files without ever being whole."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.checkpoint.architecture import Architecture, build_skeleton, find_blocks
from sculptor.checkpoint.configuration import load_config, model_class
from sculptor.checkpoint.names import Conversion, find_converted
from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import CheckpointError
from sculptor.progress import Progress, silent
from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.files import TensorFiles
from sculptor.streaming.hooks import Hooks
from sculptor.streaming.layout import Layout
from sculptor.streaming.owners import Owners
from sculptor.streaming.regions import BlockWeights, Scratch, Tier
from sculptor.streaming.transfers import Transfers, return_freed_memory
from sculptor.streaming.waiting import WaitingBlocks

Divide = Callable[[Sequence[Mapping[str, int]]], Owners]

_PIECE = 64 * 2**20  # bytes of a large tensor that are looked at at once


def stream_model(
    checkpoint: Checkpoint,
    architecture: Architecture,
    device: torch.device,
    tier: Tier,
    *,
    scratch: Path | None = None,
    compute_dtypes: Mapping[str, torch.dtype] | None = None,
    resident: frozenset[str] = frozenset(),
    keep_inputs: bool | None = None,
    progress: Progress = silent,
    divide: Divide | None = None,
    constants: Tier | None = None,
) -> tuple[Any, BlockStream]:
    """A model in evaluation mode, without gradients, and the stream of its blocks.

    Everything outside the blocks is on the device; so are parameters that several blocks share.

    Args:
        checkpoint: where the weights are.
        architecture: of the checkpoint.
        device: where the model computes.
        tier: where blocks wait.
        scratch: directory for what changes; needed in the disk tier if anything does.
        compute_dtypes: parameters of blocks that are not to be in the model's own dtype.
        resident: parameters of blocks that stay on the device.
        keep_inputs: whether activation checkpoints stay on the device; default on a CPU only.
        progress: makes progress bars.
        divide: chooses owners among several processes, from the bytes of each block's parameters; default each process has
            all of them.
        constants: where bases and W0 wait in training; default `tier`.

    Raises:
        CheckpointError: if parameters are not in the files.
        MemoryError: if the host does not give enough memory.
    """
    if device.type == "cpu":
        return_freed_memory()
    model, dtype = _empty_model(checkpoint, device)
    # Rules look at shapes, which the model's own parameters will have lost when they are used.
    converted = find_converted(build_skeleton(checkpoint), checkpoint)
    sources: dict[str, str | Conversion] = {**converted, **architecture.tensors}
    _tie(model, checkpoint, architecture, dtype)
    home = Scratch(tier, scratch, device)
    files = TensorFiles(checkpoint, sources, home.reading)
    blocks = find_blocks(model)
    found = _place_parameters(model, files, architecture, _Memory(device, dtype, compute_dtypes or {}, resident))
    held = None if divide is None else divide(found.sizes)
    layouts = found.layouts(held, set(compute_dtypes or {}))
    _move_buffers(model, checkpoint, architecture, device)
    total = sum(
        size for i, of in enumerate(found.sizes) for name, size in of.items() if held is None or held.mine(i, name)
    )
    apart = None if constants in (None, tier) else Scratch(constants, scratch, device)
    told = progress if home.in_memory else silent  # on the disk there is nothing to load
    with closing(told(total=total, desc="load", unit="B")) as bar:
        weights = BlockWeights(files, layouts, home, bar.update, held, apart)
    waiting = WaitingBlocks(
        model,
        blocks,
        found.streamed,
        weights,
        Transfers(device, threads=tier == "disk"),
        num_slots=2 if device.type == "cuda" else 1,
        keep_inputs=device.type == "cpu" if keep_inputs is None else keep_inputs,
    )
    return model.eval(), BlockStream(waiting, Hooks())


@dataclass(frozen=True, slots=True)
class _Memory:
    """Where parameters go, and in which dtype: as `stream_model` has it, `dtype` the model's own."""

    device: torch.device
    dtype: torch.dtype
    compute_dtypes: Mapping[str, torch.dtype]
    resident: frozenset[str]


@dataclass(frozen=True, eq=False, slots=True)
class _Placed:
    """The parameters of blocks that are streamed, by the name that the files know: of each block, and the shapes of all."""

    streamed: list[dict[str, nn.Parameter]]
    shapes: dict[str, tuple[int, ...]]

    @property
    def sizes(self) -> list[dict[str, int]]:
        """Bytes of each."""
        return [{name: _num_bytes(value, self.shapes[name]) for name, value in of.items()} for of in self.streamed]

    def layouts(self, held: Owners | None, changed: set[str]) -> list[Layout]:
        """Of each block: what one process owns comes together, and of that what training changes last."""
        made = []
        for i, found in enumerate(self.streamed):
            of = {name: (0 if held is None else held.order(i, name), name in changed) for name in found}
            order = sorted(found, key=of.__getitem__)
            made.append(Layout((name, found[name].dtype, self.shapes[name]) for name in order))
        return made


def _place_parameters(model: Any, files: TensorFiles, architecture: Architecture, memory: _Memory) -> _Placed:
    """Gives a model's parameters what they need on the device: all of a value, or nothing where it is streamed."""
    blocks = list(find_blocks(model))
    placed, made = _Placed([{} for _ in blocks], {}), []
    for group in _names_of_each(model):
        known = [name for name in group if name in files.sources]
        if not known and _is_made_at_load(model, group):
            made.append(group)
            continue
        shape = _checked_shape(model, files, architecture, group, known)
        wanted = memory.compute_dtypes.get(known[0], _dtype(model, known[0], memory.dtype))
        block = None if memory.resident & set(group) else _block_of(group, blocks)
        value = torch.empty(shape if block is None else 0, dtype=wanted, device=memory.device)
        if block is None:
            files.fill(known[0], value)
        new = nn.Parameter(value, requires_grad=False)
        if block is not None:
            placed.streamed[block][known[0]] = new
        for name in group:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = new
        placed.shapes[known[0]] = shape
    _make_at_load(model, made, memory.dtype, memory.device)
    return placed


def _names_of_each(model: Any) -> list[list[str]]:
    """The names of each parameter, which may be known under several."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return list(names.values())


def _checked_shape(
    model: Any, files: TensorFiles, architecture: Architecture, names: Sequence[str], known: Sequence[str]
) -> tuple[int, ...]:
    """The shape of a parameter, which its tensor has; `known` are those of its names that the files have."""
    checkpoint, shape = files.checkpoint, tuple(model.get_parameter(names[0]).shape)
    if not known:
        raise CheckpointError(
            f"{checkpoint.path}: parameter {names[0]} of {architecture.model_class} is not in the files; use --offload none"
        )
    source = files.sources[known[0]]
    if isinstance(source, str) and tuple(checkpoint.infos[source].shape) != shape:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source} has shape {list(checkpoint.infos[source].shape)}, config.json asks for "
            f"{list(shape)}"
        )
    return shape


def _block_of(names: Sequence[str], blocks: Sequence[str]) -> int | None:
    """The one block that a parameter is of; None if it is outside of them, or of several."""
    found = {next((i for i, path in enumerate(blocks) if name.startswith(path + ".")), None) for name in names}
    return found.pop() if len(found) == 1 else None


def _num_bytes(parameter: Tensor, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * parameter.dtype.itemsize


def _empty_model(checkpoint: Checkpoint, device: torch.device) -> tuple[Any, torch.dtype]:
    """The model with parameters on the meta device and real buffers, and the dtype of its parameters."""
    from accelerate import init_empty_weights

    cls = model_class(checkpoint.config, checkpoint.path)
    config = load_config(checkpoint)
    dtype = torch.float32
    if device.type != "cpu":
        floating = (info.dtype for info in checkpoint.infos.values() if info.dtype.is_floating_point)
        dtype = getattr(config, "dtype", None) or next(floating)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as transformers does when it loads
    try:
        with init_empty_weights(include_buffers=False):
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False), dtype


def _tie(model: Any, checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype) -> None:
    """Ties parameters as loading does: not those that are both in the files with different values."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    both = {
        target: (architecture.tensors[target], architecture.tensors[source])
        for target, source in tied.items()
        if target in architecture.tensors and source in architecture.tensors
    }
    apart = {
        target for target, (one, other) in both.items() if one != other and not _equal(checkpoint, one, other, dtype)
    }
    model.all_tied_weights_keys = {target: source for target, source in tied.items() if target not in apart}
    model.tie_weights(recompute_mapping=False)


def _equal(checkpoint: Checkpoint, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two tensors are loaded alike; read in pieces, since they are the largest there are."""
    a, b = checkpoint.infos[one], checkpoint.infos[other]
    if a.shape != b.shape:
        return False
    rows = max(1, _PIECE * a.shape[0] // max(1, a.num_bytes)) if a.shape else 1
    return all(
        torch.equal(checkpoint.rows(one, i, i + rows).to(dtype), checkpoint.rows(other, i, i + rows).to(dtype))
        for i in range(0, a.shape[0] if a.shape else 1, rows)
    )


def _dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype transformers loads a parameter in: some stay float32."""
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        wide |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if wide & set(name.split(".")) else dtype


def _is_made_at_load(model: Any, names: Sequence[str]) -> bool:
    """Whether loading computes a parameter that no file holds: fixed positions, say."""
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in ignored for name in names)


def _make_at_load(model: Any, groups: Sequence[Sequence[str]], dtype: torch.dtype, device: torch.device) -> None:
    """Makes such parameters as transformers does: with a module's own start values."""
    for names in groups:
        owner, _, leaf = names[0].rpartition(".")
        module = model.get_submodule(owner)
        if len(module._parameters) > 1:
            raise CheckpointError(f"{owner}: {leaf} is not in the files, others of it are; use --offload none")
        module._parameters[leaf] = nn.Parameter(torch.empty(module.get_parameter(leaf).shape), requires_grad=False)
        with torch.no_grad():
            model._init_weights(module)
        value = nn.Parameter(module.get_parameter(leaf).to(device, dtype), requires_grad=False)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = value


def _move_buffers(model: Any, checkpoint: Checkpoint, architecture: Architecture, device: torch.device) -> None:
    """Saved buffers come from the files; the others were made with the model."""
    for module_path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{module_path}.{leaf}" if module_path else leaf
            stored = architecture.tensors.get(name)
            value = checkpoint[stored].to(buffer.dtype) if stored is not None else buffer
            module._buffers[leaf] = value.to(device)
