"""The streamed writer against the library's reader."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sculptor.checkpoint.tensors import DTYPES, digest, read_header, read_tensor, write_tensors
from sculptor.errors import CheckpointError, OutputError


def test_every_dtype_and_shape_survives(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {
        f"{name}.{i}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate([(), (3,), (2, 5), (0, 4)])
    }
    file = tmp_path / "all.safetensors"
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_tensors(file, entries, tensors.__getitem__, {"format": "pt"})
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    infos, metadata = read_header(file, CheckpointError)
    assert metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert digest(loaded[name]) == digest(tensor) == digest(read_tensor(file, name, CheckpointError))
        assert infos[name].shape == tuple(tensor.shape)
        assert infos[name].num_bytes == tensor.nbytes


def test_data_are_laid_out_in_the_order_of_the_entries(tmp_path: Path) -> None:
    file = tmp_path / "order.safetensors"
    entries = [(name, torch.float32, (2,)) for name in ("z", "a", "m")]
    write_tensors(file, entries, lambda name: torch.full((2,), float(ord(name))), {})
    with safe_open(file, "pt") as opened:
        assert list(opened.offset_keys()) == ["z", "a", "m"]


def test_a_full_disk_is_one_line(tmp_path: Path, small_disk: None) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_tensors(
            tmp_path / "a.safetensors", [("a", torch.float32, (1 << 20,))], lambda _: torch.zeros(1 << 20), {}
        )
