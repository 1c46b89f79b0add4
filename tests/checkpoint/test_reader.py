"""Opening checkpoints, and every way in which that can fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file, save_file

from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.tensors import digest
from sculptor.errors import CheckpointError


def test_tensors_equal_those_of_the_library(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", dtype=torch.bfloat16, max_shard_size="20KB")
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.files) > 1
    for file in checkpoint.files:
        for name, tensor in load_file(path / file).items():
            assert torch.equal(checkpoint[name], tensor)
            assert checkpoint.infos[name].file == file
    assert checkpoint.num_bytes == sum(checkpoint[name].nbytes for name in checkpoint)


def test_identity_does_not_depend_on_sharding(tmp_path: Path) -> None:
    single, sharded = (
        open_checkpoint(save_checkpoint(tmp_path / size, max_shard_size=size)) for size in ("1GB", "20KB")
    )
    first, second = ({name: digest(c[name]) for name in c} for c in (single, sharded))
    assert identity(first) == identity(dict(reversed(second.items())))


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def broken_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickled(path: Path) -> None:
    no_weights(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 4096)


def quantised(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))


FAULTS = [
    (empty, "empty directory"),
    (no_config, "no config.json"),
    (broken_config, "config.json: damaged"),
    (no_weights, "no model.safetensors"),
    (pickled, "only pickled weights .*save_pretrained"),
    (truncated, "truncated or corrupt"),
    (corrupt, "truncated or corrupt"),
    (quantised, "quantised checkpoint .awq"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=[damage.__name__ for damage, _ in FAULTS])
def test_faults_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = save_checkpoint(tmp_path / "model")
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_shard_and_wrong_index(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", max_shard_size="20KB")
    first = sorted(path.glob("*.safetensors"))[0]
    moved = path / "elsewhere"
    first.rename(moved)
    with pytest.raises(CheckpointError, match=f"1 of .* shards are missing .{first.name}"):
        open_checkpoint(path)
    tensors = load_file(moved)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, first)
    with pytest.raises(CheckpointError, match="not in the shard the index names"):
        open_checkpoint(path)


def test_missing_directory_file_and_hub_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory, and not a hub name"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        open_checkpoint("nobody/nothing-of-this-name")


def test_nan_is_named_by_tensor(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, :3] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} has 3 NaN"):
        Checkpoint(path).read_finite(name)
