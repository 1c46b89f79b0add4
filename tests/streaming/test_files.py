"""A checkpoint's tensors read into memory that is there already."""

from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file, save_file

from sculptor.checkpoint.reader import Checkpoint, Slice, open_checkpoint
from sculptor.errors import CheckpointError
from sculptor.streaming.files import TensorFiles
from sculptor.streaming.transfers import Staging

CPU = torch.device("cpu")
NAME = "model.layers.0.mlp.down_proj.weight"


def files_of(checkpoint: Checkpoint, staged: int = 2**20) -> TensorFiles:
    return TensorFiles(checkpoint, {"parameter": NAME}, Staging(CPU, staged))


@pytest.mark.parametrize("staged", [256, 2**20])
@pytest.mark.parametrize(("stored", "wanted"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_what_is_read_is_what_is_there(stored: torch.dtype, wanted: torch.dtype, staged: int, tmp_path: Path) -> None:
    """In its own dtype at once, in another piece by piece."""
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model", dtype=stored))
    files, expected = files_of(checkpoint, staged), checkpoint[NAME].to(wanted)
    for read in (lambda into: files.fill("parameter", into), lambda into: files.read(Slice(NAME), into)):
        into = torch.empty(expected.shape, dtype=wanted)
        read(into)
        assert torch.equal(into, expected)
    files.close()


def test_what_diverged_is_refused_at_the_first_sight(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors[NAME][1, 2] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    files, into = files_of(open_checkpoint(path)), torch.empty(tensors[NAME].shape)
    with pytest.raises(CheckpointError, match=r"parameter has NaN or infinite values"):
        files.fill("parameter", into)
    files.fill("parameter", into)  # asked once: every step would wait for it
    files.close()


def test_a_file_that_went_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    files = files_of(checkpoint)
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: cannot read tensor {NAME} "):
        files.fill("parameter", torch.empty(checkpoint.infos[NAME].shape))
