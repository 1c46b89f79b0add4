"""A Hugging Face checkpoint directory as a lazy mapping from tensor name to tensor."""

import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from sculptor.checkpoint.directory import (
    CONFIG_NAME,
    HUB_IGNORED,
    check_links,
    directory_problem,
    read_config,
    weight_files,
)
from sculptor.checkpoint.tensors import TensorInfo, digest, dtype_name, in_threads, read_header, read_known
from sculptor.errors import CheckpointError
from sculptor.numerics.finite import is_finite
from sculptor.progress import Progress, silent


class Sliced(Protocol):
    """What names a matrix in a checkpoint, a tensor or a slice of its first dimension: a `Slice`, a target, a record."""

    @property
    def name(self) -> str: ...
    @property
    def tensor(self) -> str: ...
    @property
    def part(self) -> int | None: ...


class Slice(NamedTuple):
    """A tensor, or a slice of one."""

    tensor: str
    part: int | None = None

    @property
    def name(self) -> str:
        """What it is called."""
        return part_name(*self)


def part_name(tensor: str, part: int | None) -> str:
    """What a tensor, or a slice of one, is called."""
    return tensor if part is None else f"{tensor}[{part}]"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a saved model; headers are read on opening, data when asked for.

    Args:
        path: a directory with config.json and safetensors weights, single or sharded.

    Raises:
        CheckpointError: if the directory, its configuration or one of its shards is missing or damaged.
    """

    attn_implementation: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        check_links(path)
        places, self.files = weight_files(path, self.config)
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            infos, metadata = read_header(path / file, CheckpointError, file)
            self.metadata |= metadata
            repeated = sorted(set(infos) & set(self.infos))
            if repeated:
                other = self.infos[repeated[0]].file
                raise CheckpointError(f"{path / file}: tensor {repeated[0]} is also in {other}; remove one of the two")
            self.infos |= infos
        if not self.infos:
            raise CheckpointError(f"{path}: the weight files hold no tensor; fetch the checkpoint again")
        if places is not None:
            self._check_index(places)
        self.unlisted = tuple(sorted(set(self.infos) - set(places))) if places is not None else ()
        self._check_dtypes()

    def __getitem__(self, name: str) -> Tensor:
        return read_known(self.path / self.infos[name].file, name, self.infos[name], CheckpointError)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def _check_index(self, places: Mapping[str, str]) -> None:
        wrong = [name for name, file in places.items() if name not in self.infos or self.infos[name].file != file]
        if wrong:
            raise CheckpointError(
                f"{self.path}: {len(wrong)} of {len(places)} tensors are not in the shard the index names, "
                f"first {wrong[0]}; index and shards belong to different checkpoints"
            )

    def _check_dtypes(self) -> None:
        for name, info in self.infos.items():
            if info.dtype.is_floating_point and info.dtype.itemsize == 1:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is {dtype_name(info.dtype)}; sculptor needs the weights in bfloat16 or wider"
                )

    def info_of(self, at: Sliced) -> TensorInfo:
        """Where a matrix is; a slice of a tensor is as good as a tensor.

        Raises:
            CheckpointError: if there is no such slice.
        """
        info = self.infos[at.tensor]
        if at.part is None:
            return info
        if len(info.shape) < 2 or not 0 <= at.part < info.shape[0]:
            raise CheckpointError(f"{self.path}: tensor {at.tensor} of shape {list(info.shape)} has no part {at.part}")
        size = info.num_bytes // info.shape[0]
        return TensorInfo(info.file, info.dtype, info.shape[1:], info.offset + at.part * size)

    def has(self, at: Sliced) -> bool:
        """Whether a matrix is in the files."""
        info = self.infos.get(at.tensor)
        return info is not None and (at.part is None or (len(info.shape) > 1 and 0 <= at.part < info.shape[0]))

    def matrix(self, at: Sliced) -> Tensor:
        """A matrix as stored; of a slice, nothing else is read."""
        info = self.info_of(at)
        return read_known(self.path / info.file, at.name, info, CheckpointError)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor's first dimension, cut at its end; nothing else is read."""
        info = self.infos[name]
        if not info.shape:
            return self[name]
        stop = min(stop, info.shape[0])
        size = info.num_bytes // max(1, info.shape[0])
        part = TensorInfo(info.file, info.dtype, (stop - start, *info.shape[1:]), info.offset + start * size)
        return read_known(self.path / info.file, name, part, CheckpointError)

    def read_finite(self, name: str) -> Tensor:
        """One tensor, checked for NaN and infinity.

        Raises:
            CheckpointError: if it has any.
        """
        return self.check_finite(Slice(name), self[name])

    def finite_matrix(self, at: Sliced) -> Tensor:
        """One matrix, checked for NaN and infinity.

        Raises:
            CheckpointError: if it has any.
        """
        return self.check_finite(at, self.matrix(at))

    def check_finite(self, at: Sliced, tensor: Tensor) -> Tensor:
        """A matrix that has been read, if it has no NaN and no infinity.

        Raises:
            CheckpointError: if it has any.
        """
        if not is_finite(tensor):
            count = int((~tensor.float().isfinite()).sum())
            raise CheckpointError(
                f"{self.path}: tensor {at.name} has {count} NaN or infinite of {tensor.numel()} values; "
                "use a checkpoint from before the training diverged"
            )
        return tensor

    def digests_beside(self, known: Container[str], progress: Progress = silent) -> dict[str, str]:
        """SHA-256 of every tensor that is not known otherwise, and of the configuration: what else makes the model."""
        names = [name for name in self if name not in known]
        with closing(
            progress(total=sum(self.infos[name].num_bytes for name in names), desc="check model", unit="B")
        ) as bar:
            found = {}
            for name, mark in zip(names, in_threads(lambda name: digest(self[name]), names), strict=True):
                found[name] = mark
                bar.update(self.infos[name].num_bytes)
        text = json.dumps(self.config, sort_keys=True)
        return found | {CONFIG_NAME: hashlib.sha256(text.encode()).hexdigest()}

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.num_bytes for info in self.infos.values())


def open_checkpoint(model: str | Path, attn_implementation: str | None = None) -> Checkpoint:
    """Opens a local directory, or fetches a hub name into the hub's cache first.

    Args:
        model: directory or hub name.
        attn_implementation: which attention its model is to be built with, wherever it is [default: transformers' choice].

    Raises:
        CheckpointError: if there is no such directory or hub model, or it cannot be used.
    """
    checkpoint = Checkpoint(find_directory(model))
    checkpoint.attn_implementation = attn_implementation
    return checkpoint


def find_directory(model: str | Path) -> Path:
    """A local directory as it is, or a hub name's, fetched into the hub's cache first.

    Raises:
        CheckpointError: if there is no such directory or hub model.
    """
    path = Path(model)
    if os.path.isdir(path):  # unlike Path.is_dir, takes any name
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{path}: {directory_problem(path)}")
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such directory, and not a hub name of the form owner/model")
    return _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=list(HUB_IGNORED)))
    except Exception as cause:  # the hub client raises a dozen unrelated types, offline, gated, not found, ...
        reason = (str(cause).strip().splitlines() or [""])[0][:160]
        raise CheckpointError(
            f"{name}: no such directory, and it could not be fetched from the hub ({type(cause).__name__}: {reason})"
        ) from cause


def identity(digests: Mapping[str, str]) -> str:
    """One digest for a set of tensors: SHA-256 over their sorted `name=digest` lines, whatever the sharding."""
    text = "".join(f"{name}={digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()
