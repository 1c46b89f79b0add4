"""Tensors found and read as transformers itself finds and reads them."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, GROUPED, IDS, save_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sculptor.checkpoint.architecture import build_skeleton
from sculptor.checkpoint.names import find_converted, match_names
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.tensors import DTYPES, read_bytes, read_header, write_bytes, write_tensors
from sculptor.errors import CheckpointError

EXPERTS = ("mixtral", "qwen3-moe")
LOCAL: dict[str, Callable[[], Any]] = {
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**(GROUPED | IDS), num_experts=12, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}


@pytest.fixture(autouse=True)
def local_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in LOCAL.items():
        monkeypatch.setitem(FAMILIES, name, make)


def read_at(path: Path, offset: int, like: Tensor) -> Tensor:
    """The tensor whose bytes begin at an offset of a file."""
    found = torch.empty(like.nbytes, dtype=torch.uint8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        read_bytes(descriptor, offset, found)
    finally:
        os.close(descriptor)
    return found.view(like.dtype).view(like.shape)


def same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def make_tensors(generator: torch.Generator) -> dict[str, Tensor]:
    """Every dtype and the shapes at the edge, in no order of size."""
    return {
        f"{name}.{i}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for i, shape in enumerate([(3,), (), (2, 5), (0, 4), (7, 1)])
        for name, dtype in DTYPES.items()
    }


@pytest.mark.parametrize("writer", ["library", "sculptor"])
def test_offsets_point_at_the_bytes(writer: str, tmp_path: Path, generator: torch.Generator) -> None:
    tensors, file = make_tensors(generator), tmp_path / "all.safetensors"
    if writer == "library":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        write_tensors(file, entries, tensors.__getitem__, {"format": "pt"})
    infos, _ = read_header(file, CheckpointError)
    assert infos.keys() == tensors.keys()
    with safe_open(file, "pt") as opened:
        for name, info in infos.items():
            expected = opened.get_tensor(name)
            assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape))
            assert same_bytes(read_at(file, info.offset, expected), expected), name
    ends = sorted((info.offset, info.offset + info.num_bytes) for info in infos.values())
    assert ends[-1][1] == file.stat().st_size
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_tensor_of_a_checkpoint_in_shards_is_where_its_header_says(family: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, max_shard_size="30KB")
    checkpoint = open_checkpoint(path)
    assert len({info.file for info in checkpoint.infos.values()}) > 1
    for name, info in checkpoint.infos.items():
        assert same_bytes(read_at(path / info.file, info.offset, checkpoint[name]), checkpoint[name]), name


def test_a_file_that_ends_too_early_says_how_much_is_missing(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with pytest.raises(OSError, match="ends 3 bytes too early"):
        read_at(tmp_path / "short", 4, torch.empty(9, dtype=torch.uint8))
    with pytest.raises(OSError, match="ends 9 bytes too early"):
        read_at(tmp_path / "short", 100, torch.empty(9, dtype=torch.uint8))


def test_bytes_are_written_where_they_belong(tmp_path: Path, generator: torch.Generator) -> None:
    whole = torch.randint(256, (100,), dtype=torch.uint8, generator=generator)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        for start, stop in ((60, 100), (0, 30), (30, 60), (10, 10)):
            write_bytes(descriptor, start, whole[start:stop])
    finally:
        os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == bytes(whole.tolist())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "t5", "bert", "phi3"])
def test_names_are_matched_and_nothing_is_converted(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", family))
    skeleton = build_skeleton(checkpoint)
    expected = type(FAMILIES[family]()).from_pretrained(checkpoint.path).state_dict()
    assert find_converted(skeleton, checkpoint) == {}
    matched = match_names(skeleton, checkpoint)
    assert sorted(matched.values()) == sorted(checkpoint)
    for parameter, name in matched.items():
        assert torch.equal(checkpoint[name], expected[parameter]), parameter


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_converted_as_transformers_converts_them(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", family, dtype=dtype, max_shard_size="30KB")
    checkpoint = open_checkpoint(path)
    skeleton = build_skeleton(checkpoint)
    expected = dict(type(skeleton).from_pretrained(path, dtype=dtype).named_parameters())
    converted = find_converted(skeleton, checkpoint)
    matched = match_names(skeleton, checkpoint)
    assert converted.keys() | matched.keys() == expected.keys()
    assert not converted.keys() & matched.keys()
    assert {name.rpartition(".")[2] for name in converted} == {"gate_up_proj", "down_proj"}
    for parameter, conversion in converted.items():
        for _ in range(2):  # a rule is used up by nothing
            made = conversion.make(checkpoint.__getitem__)
            assert made[parameter].dtype == dtype
            assert torch.equal(made[parameter], expected[parameter]), parameter
    used = [name for conversion in converted.values() for name, _ in conversion.sources]
    assert sorted([*used, *matched.values()]) == sorted(checkpoint)


@pytest.mark.parametrize("family", EXPERTS)
def test_the_order_of_experts_in_the_files_does_not_matter(family: str, tmp_path: Path) -> None:
    """With more than ten experts, the tenth comes before the second in the order of the alphabet."""
    path = save_checkpoint(tmp_path / "model", family)
    tensors = load_file(path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    expected = find_converted(build_skeleton(checkpoint), checkpoint)
    found = find_converted(build_skeleton(checkpoint), sorted(tensors, reverse=True))
    assert found.keys() == expected.keys()
    for parameter, conversion in found.items():
        assert conversion.sources == expected[parameter].sources
        made = conversion.make(tensors.__getitem__)[parameter]
        assert torch.equal(made, expected[parameter].make(checkpoint.__getitem__)[parameter])


def test_a_parameter_reads_its_own_tensors_and_each_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", "mixtral"))
    read: list[str] = []

    def get(name: str) -> Tensor:
        read.append(name)
        return checkpoint[name]

    for conversion in find_converted(build_skeleton(checkpoint), checkpoint).values():
        read.clear()
        conversion.make(get)
        assert read == [name for name, _ in conversion.sources]
