"""A Hugging Face checkpoint directory as a lazy mapping from tensor name to tensor."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sculptor.checkpoint.tensors import TensorInfo, read_header, read_known
from sculptor.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What is worth fetching from a hub, and worth carrying over to an output: everything but weights and code.
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".vocab", ".pdf")


class Placed(Protocol):
    """A matrix in a checkpoint: a tensor, or a slice of its first dimension."""

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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self.files = _weight_files(path)
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            infos, metadata = read_header(path / file, CheckpointError)
            self.metadata |= metadata
            repeated = sorted(set(infos) & set(self.infos))
            if repeated:
                other = self.infos[repeated[0]].file
                raise CheckpointError(f"{path / file}: tensor {repeated[0]} is also in {other}; remove one of the two")
            self.infos |= infos
        if not self.infos:
            raise CheckpointError(f"{path}: the weight files hold no tensor; fetch the checkpoint again")
        _check_index(path, self.infos)

    def __getitem__(self, name: str) -> Tensor:
        return read_known(self.path / self.infos[name].file, name, self.infos[name], CheckpointError)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def info_of(self, place: Placed) -> TensorInfo:
        """Where a matrix is; a slice of a tensor is as good as a tensor.

        Raises:
            CheckpointError: if there is no such slice.
        """
        info = self.infos[place.tensor]
        if place.part is None:
            return info
        if len(info.shape) < 2 or not 0 <= place.part < info.shape[0]:
            raise CheckpointError(
                f"{self.path}: tensor {place.tensor} of shape {list(info.shape)} has no part {place.part}"
            )
        size = info.num_bytes // info.shape[0]
        return TensorInfo(info.file, info.dtype, info.shape[1:], info.offset + place.part * size)

    def has(self, place: Placed) -> bool:
        """Whether a matrix is in the files."""
        info = self.infos.get(place.tensor)
        return info is not None and (place.part is None or (len(info.shape) > 1 and 0 <= place.part < info.shape[0]))

    def matrix(self, place: Placed) -> Tensor:
        """A matrix as stored; of a slice, nothing else is read."""
        info = self.info_of(place)
        return read_known(self.path / info.file, place.name, info, CheckpointError)

    def read_finite(self, name: str) -> Tensor:
        """One tensor, checked for NaN and infinity.

        Raises:
            CheckpointError: if it has any.
        """
        return self._finite(name, self[name])

    def finite_matrix(self, place: Placed) -> Tensor:
        """One matrix, checked for NaN and infinity.

        Raises:
            CheckpointError: if it has any.
        """
        return self._finite(place.name, self.matrix(place))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            tensor = tensor.to(torch.float32)  # float8 has no isfinite
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{self.path}: tensor {name} has {count} NaN or infinite of {tensor.numel()} values; "
                "use a checkpoint from before the training diverged"
            )
        return tensor

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.num_bytes for info in self.infos.values())


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens a local directory, or fetches a hub name into the hub's cache first.

    Raises:
        CheckpointError: if there is no such directory or hub model, or it cannot be used.
    """
    path = Path(model)
    if os.path.isdir(path):  # unlike Path.is_dir, takes any name
        return Checkpoint(path)
    if os.path.exists(path):
        raise CheckpointError(f"{path}: is a file; expected a checkpoint directory")
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such directory, and not a hub name of the form owner/model")
    return Checkpoint(_fetch(name))


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "LICENSE*", *(f"*{suffix}" for suffix in COMPANION_SUFFIXES)]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as cause:  # the hub client raises a dozen unrelated types, offline, gated, not found, ...
        reason = (str(cause).strip().splitlines() or [""])[0][:160]
        raise CheckpointError(
            f"{name}: no such directory, and it could not be fetched from the hub ({type(cause).__name__}: {reason})"
        ) from cause


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not path.is_dir() or not any(path.iterdir()):
        raise CheckpointError(f"{path}: empty directory; expected config.json and safetensors weights")
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; expected a Hugging Face checkpoint directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as cause:
        raise CheckpointError(f"{file}: not readable as JSON ({cause}); fetch it again") from cause
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(config).__name__}")
    if config.get("quantization_config"):
        found = config["quantization_config"]
        method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
        raise CheckpointError(f"{path}: quantised checkpoint ({method}); sculptor needs the unquantised weights")
    if config.get("auto_map"):
        raise CheckpointError(f"{path}: needs custom code (auto_map in config.json), which sculptor does not run")
    return config


def _weight_files(path: Path) -> tuple[str, ...]:
    index = path / INDEX_NAME
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise CheckpointError(f"{index}: not a weight index ({cause}); fetch it again") from cause
        missing = [file for file in files if not (path / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(files)} shards are missing ({', '.join(missing[:3])}); fetch them again"
            )
        return tuple(files)
    if (path / SINGLE_NAME).is_file():
        return (SINGLE_NAME,)
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code when read; convert them where you trust "
            'them: AutoModel.from_pretrained(DIR).save_pretrained(OUT), with the class named in "architectures"'
        )
    loose = sorted(file.name for file in path.glob("*.safetensors"))
    hint = f"; {loose[0]} is not named in an index" if loose else ""
    raise CheckpointError(f"{path}: no {SINGLE_NAME} and no {INDEX_NAME}{hint}")


def _check_index(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    index = path / INDEX_NAME
    if not index.is_file():
        return
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    wrong = [name for name, file in weight_map.items() if name not in infos or infos[name].file != file]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(weight_map)} tensors are not in the shard the index names, "
            f"first {wrong[0]}; index and shards belong to different checkpoints"
        )


def identity(digests: Mapping[str, str]) -> str:
    """One digest for a set of tensors: SHA-256 over their sorted `name=digest` lines, whatever the sharding."""
    text = "".join(f"{name}={digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()
