"""Safetensors files, one tensor at a time: headers, reading without mapping, streamed writing."""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sculptor.checkpoint.written import note
from sculptor.errors import OutputError, SculptorError
from sculptor.validation import each_key_once

T = TypeVar("T")
R = TypeVar("R")
# That read and hash tensors at a time: each holds one.
_THREADS = 8
# Names of the safetensors format, https://github.com/huggingface/safetensors#format
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.dtype.itemsize * _prod(self.shape)


def _prod(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def read_header(
    path: Path, error: type[SculptorError], file_name: str | None = None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file in the order of their data, and its metadata; the library validates the header.

    `file_name` is what the file is called in the infos, its own name by default.

    Raises:
        error: if the file is truncated, corrupt, or holds a dtype that is not supported.
    """
    try:
        with safe_open(path, "np") as file:  # as "pt" it would map the file for writing, which takes memory to commit
            names = file.offset_keys()
            slices = {name: file.get_slice(name) for name in names}
            metadata = dict(file.metadata() or {})
            shapes = {name: (item.get_dtype(), tuple(item.get_shape())) for name, item in slices.items()}
        offsets = _read_offsets(path)
    except FileNotFoundError:
        raise error(f"{path}: no such file; copy the missing shard back") from None
    except (SafetensorError, OSError, ValueError) as cause:
        raise error(f"{path}: truncated or corrupt safetensors file ({cause}); fetch it again") from cause
    unknown = sorted({dtype for dtype, _ in shapes.values()} - set(DTYPES))
    if unknown:
        raise error(f"{path}: dtype {', '.join(unknown)} is not supported; expected one of {', '.join(DTYPES)}")
    infos = {
        name: TensorInfo(file_name or path.name, DTYPES[dtype], shape, offsets[name])
        for name, (dtype, shape) in shapes.items()
    }
    return infos, metadata


def _read_offsets(path: Path) -> dict[str, int]:
    """Where in the file each tensor begins; the header has been validated."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=each_key_once)
    return {name: 8 + length + item["data_offsets"][0] for name, item in header.items() if name != "__metadata__"}


def read_bytes(descriptor: int, offset: int, into: Tensor) -> None:
    """Fills a contiguous CPU tensor of bytes from an open file, without mapping it.

    Raises:
        OSError: if the file ends before.
    """
    view = into.numpy().data
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"the file ends {len(view) - done} bytes too early")
        done += count


def write_bytes(descriptor: int, offset: int, source: Tensor) -> None:
    """Writes a contiguous CPU tensor of bytes into an open file."""
    view = source.numpy().data
    done = 0
    while done < len(view):
        done += os.pwritev(descriptor, [view[done:]], offset + done)


def read_tensor(path: Path, name: str, error: type[SculptorError]) -> Tensor:
    """One tensor on the CPU, read without mapping the file.

    Raises:
        error: if it is not there or cannot be read.
    """
    infos, _ = read_header(path, error)
    if name not in infos:
        raise error(f"{path}: cannot read tensor {name} (not in the file); fetch the file again")
    return read_known(path, name, infos[name], error)


def read_known(path: Path, name: str, info: TensorInfo, error: type[SculptorError]) -> Tensor:
    """`read_tensor` for a file whose header has been read.

    Raises:
        error: if it cannot be read.
    """
    memory = torch.empty(info.num_bytes, dtype=torch.uint8)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            read_bytes(descriptor, info.offset, memory)
        finally:
            os.close(descriptor)
    except OSError as cause:
        raise error(f"{path}: cannot read tensor {name} ({cause}); fetch the file again") from cause
    return memory.view(info.dtype).reshape(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, as the format stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> Any:
    """What JSON calls a dtype: `bfloat16`. Typed loosely, since records have literals where it goes."""
    return str(dtype).removeprefix("torch.")


def digest(tensor: Tensor) -> str:
    """SHA-256 of the raw bytes of a tensor, in hexadecimal."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def in_threads(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in order, of several items at a time: reading and hashing leave the interpreter to others."""
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(call, items)


def in_file_order(
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Wide dtypes first: keeps every tensor aligned."""
    return sorted(entries, key=lambda entry: -entry[1].itemsize)


def remedy_of(cause: OSError) -> str:
    """What to do where something could not be written."""
    allowed = cause.errno not in (errno.EACCES, errno.EPERM, errno.EROFS)
    return f"{'free some space or ' if allowed else ''}choose another place"


def write_tensors(
    path: Path,
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor | Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file with one tensor, or slice of one, in memory at a time.

    Args:
        path: the file; overwritten.
        entries: name, dtype and shape of every tensor; data are laid out in this order, wide dtypes first.
        produce: gives the tensor of a name, or its slices along the first dimension; called once each, in the order of the
            data.
        metadata: goes into the header.

    Raises:
        OutputError: if the file cannot be written.
    """
    ordered = in_file_order(entries)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in ordered:
        end = offset + dtype.itemsize * _prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        note(path)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)))
            file.write(text)
            for name, dtype, shape in ordered:
                made = produce(name)
                if isinstance(made, Tensor):
                    assert (made.dtype, tuple(made.shape)) == (dtype, shape), name
                    file.write(tensor_bytes(made))
                    continue
                count = 0
                for part in made:
                    assert (part.dtype, tuple(part.shape)) == (dtype, shape[1:]), name
                    file.write(tensor_bytes(part))
                    count += 1
                assert count == shape[0], name
    except OSError as cause:
        raise OutputError(f"{path}: cannot write ({cause.strerror}); {remedy_of(cause)}") from cause
