"""Writing a checkpoint as an edited copy of another: same names, layout and companions, some tensors replaced."""

import functools
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from sculptor.checkpoint.declared_dtypes import is_inner
from sculptor.checkpoint.directory import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, companions
from sculptor.checkpoint.reader import Checkpoint, Slice, Sliced
from sculptor.checkpoint.records import RECORD_NAME
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tensors import dtype_name, in_file_order, write_tensors
from sculptor.progress import Bar

Entry = tuple[str, torch.dtype, tuple[int, ...]]
# What makes a new tensor, or slice of one, from the old.
Edit = Callable[[Tensor], Tensor]
P = TypeVar("P", bound=Sliced)
# Written by sculptor itself; never copied from a base that is itself an output.
_OWN_FILES = (RECORD_NAME, "metrics.jsonl", INDEX_NAME)


def write_checkpoint(
    source: Checkpoint,
    directory: Path,
    replace: Mapping[str, Edit | Mapping[int, Edit]],
    *,
    dtype: torch.dtype | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    added: Mapping[str, Tensor] = MappingProxyType({}),
    dropped: Container[str] = (),
    bar: Bar | None = None,
) -> None:
    """Copies a checkpoint shard by shard, one tensor in memory, editing some of its tensors on the way.

    Args:
        source: what is copied.
        directory: an existing directory to write into.
        replace: per tensor name, what makes the new tensor from the old one (same shape, right dtype), or that for some
            slices of its first dimension, which then go through memory one by one.
        dtype: dtype of every floating-point tensor; None keeps each as it is.
        shapes: of tensors that are replaced by some of another shape.
        added: tensors that the source has not.
        dropped: tensors that are left out.
        bar: advanced by the bytes of the source.

    Raises:
        OutputError: if a file cannot be written.
        CheckpointError: if a source tensor cannot be read.
    """
    planned = _plan_shards(source, dtype, shapes or {})
    kept = [[entry for entry in entries if entry[0] not in dropped] for entries in planned]
    kept[-1] += [(name, output_dtype(value.dtype, dtype), tuple(value.shape)) for name, value in added.items()]
    shards = [entries for entries in kept if entries]
    names = [SINGLE_NAME] if len(shards) == 1 else _shard_names(len(shards))
    metadata = source.metadata or {"format": "pt"}
    for file, entries in zip(names, shards, strict=True):
        target_dtypes = {name: out for name, out, _ in entries}

        def produce(name: str, target_dtypes: dict[str, torch.dtype] = target_dtypes) -> Tensor | Iterator[Tensor]:
            if name in added:
                return added[name].to(target_dtypes[name])
            edit = replace.get(name) or functools.partial(_cast, target_dtypes[name])
            if bar is not None:
                bar.update(source.infos[name].num_bytes)
            return (
                _by_slices(source, name, edit, target_dtypes[name]) if isinstance(edit, Mapping) else edit(source[name])
            )

        write_tensors(directory / file, entries, produce, metadata)
    if len(shards) > 1:
        _write_index(directory, names, shards)
    _copy_companions(source.path, directory)
    _write_config(source.config, directory, dtype)


def edits_of(places: Iterable[P], make: Callable[[P], Edit]) -> dict[str, Edit | Mapping[int, Edit]]:
    """What makes new tensors, of an edit for each of some matrices, which may be slices of one tensor."""
    whole: dict[str, Edit] = {}
    parts: dict[str, dict[int, Edit]] = defaultdict(dict)
    for at in places:
        if at.part is None:
            whole[at.tensor] = make(at)
        else:
            parts[at.tensor][at.part] = make(at)
    return {**whole, **parts}


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype)


def _by_slices(source: Checkpoint, name: str, edits: Mapping[int, Edit], dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor's slices, some of them edited."""
    for part in range(source.infos[name].shape[0]):
        old = source.matrix(Slice(name, part))
        yield edits[part](old) if part in edits else old.to(dtype)


def names_as_written(source: Checkpoint, places: Mapping[str, P], dtype: torch.dtype | None) -> list[str]:
    """Names of matrices in the order in which `write_checkpoint` asks for them."""
    parts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, at in places.items():
        parts[at.tensor].append((at.part or 0, name))
    tensors = (name for entries in _plan_shards(source, dtype) for name, _, _ in in_file_order(entries))
    return [name for tensor in tensors for _, name in sorted(parts.get(tensor, []))]


def output_dtype(source: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a source tensor is written in; integers and booleans stay as they are."""
    return dtype if dtype is not None and source.is_floating_point else source


def _plan_shards(
    source: Checkpoint, dtype: torch.dtype | None, shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
) -> list[list[Entry]]:
    """The source's shards; one that a wider dtype makes larger than the largest of them is split."""
    sizes = dict.fromkeys(source.files, 0)
    for info in source.infos.values():
        sizes[info.file] += info.num_bytes
    limit = max(sizes.values()) if len(source.files) > 1 else None
    shards: list[list[Entry]] = []
    for file in source.files:
        current: list[Entry] = []
        current_bytes = 0
        for name, info in source.infos.items():
            if info.file != file:
                continue
            out, shape = output_dtype(info.dtype, dtype), shapes.get(name, info.shape)
            size = prod(shape) * out.itemsize
            if limit is not None and current and current_bytes + size > limit:
                shards.append(current)
                current, current_bytes = [], 0
            current.append((name, out, shape))
            current_bytes += size
        shards.append(current)
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_index(directory: Path, names: list[str], shards: list[list[Entry]]) -> None:
    weight_map = {name: file for file, entries in zip(names, shards, strict=True) for name, _, _ in entries}
    total = sum(dtype.itemsize * torch.Size(shape).numel() for entries in shards for _, dtype, shape in entries)
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_companions(source: Path, directory: Path) -> None:
    """What goes along (`directory.companions`), but what we write ourselves."""
    for relative in companions(source):
        if relative.as_posix() in _OWN_FILES:
            continue
        with writing(directory / relative):
            (directory / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, directory / relative)


def _inner_cast(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """With every dtype of configurations in a configuration another: some classes load by those."""
    changed = dict(config)
    for key, value in config.items():
        if is_inner(key, value):
            named = dict.fromkeys((name for name in ("dtype", "torch_dtype") if value.get(name) is not None), dtype)
            changed[key] = {**_inner_cast(value, dtype), **named}
    return changed


def _write_config(config: dict[str, Any], directory: Path, dtype: torch.dtype | None) -> None:
    changed = dict(config)
    place = config.get("_name_or_path")
    if isinstance(place, str) and (
        os.path.isabs(place) or place.startswith((".", "~", "\\")) or re.match(r"\w:", place)
    ):
        del changed["_name_or_path"]  # where somebody kept it; nothing reads that
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        changed = {**_inner_cast(changed, dtype_name(dtype)), key: dtype_name(dtype)}
    if changed != config:
        # Infinite numbers as they were read: transformers' own files have them.
        write_json(directory / CONFIG_NAME, changed, allow_nan=True)
