"""Streams, pinned memory and threads exist only with a GPU: the same results from every place where blocks wait."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file
from torch import Tensor

import sculptor
from sculptor.errors import Stopped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
MATRIX = {"clip_by": "matrix", "micro_batch_size": 6}


def train(
    tmp_path: Path, output: Path | None = None, *, resume: bool = False, stop: Any = lambda: None, **changes: Any
) -> dict[str, Tensor]:
    """The merged tensors of a short run; what it does not say is resident."""
    output = output or tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    values: dict[str, Any] = {
        "offload": "none", "max_steps": 4, "batch_size": 6, "micro_batch_size": 2, "learning_rate": 1e-2, "clip": 0.1,
        "save_every": 100, "save_dtype": "float32", "device": "cuda",
    }  # fmt: skip
    settings = sculptor.TrainSettings(**(values | changes))
    data = [tmp_path / "rows.jsonl"]
    sculptor.train(tmp_path / "model", tmp_path / "archive", data, output, settings, resume=resume, stop=stop)
    return load_file(output / "model.safetensors")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A checkpoint of several blocks, its archive, and rows."""
    save_checkpoint(tmp_path / "model", "t5")  # two stacks, four blocks
    write_rows(tmp_path / "rows.jsonl", task_rows())
    settings = sculptor.AnalyzeSettings(preserve=0.5, device="cuda")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", settings)
    return tmp_path


def distance(task: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of two results, as a share of the update."""
    before = load_file(task / "model" / "model.safetensors")
    update = sum(float((expected[name] - before[name]).double().square().sum()) for name in before)
    return (sum(float((found[name] - expected[name]).double().square().sum()) for name in before) / update) ** 0.5


@pytest.mark.parametrize("rest", [{}, {"optimizer_mode": "fused", **MATRIX}], ids=["exact", "fused"])
def test_host_memory_and_disk_agree_bit_for_bit(task: Path, rest: dict[str, Any]) -> None:
    where = {} if rest else {"optimizer_on": "device"}
    on_host, on_disk = train(task, offload="cpu", **where, **rest), train(task, offload="disk", **rest)
    assert all(torch.equal(on_host[name], on_disk[name]) for name in on_host)
    again = train(task, offload="cpu", offload_inputs=False, **where, **rest)
    assert all(torch.equal(on_host[name], again[name]) for name in on_host)


@pytest.mark.parametrize(
    "changes",
    [{"offload": "cpu"}, {"offload": "cpu", "optimizer_on": "device"}, {"offload": "disk"}],
    ids=["host", "device", "disk"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_steps_are_those_of_a_resident_run(task: Path, changes: dict[str, Any], dtype: str) -> None:
    """Later ones are told apart by what bf16 weights make of the last bit.

    Resident without recomputation, since that of transformers changes T5: its cross-attention takes another kernel then,
    which rounds and drops out differently.
    """
    told = {"max_steps": 2, "optimizer_dtype": dtype}
    resident = train(task, **told, checkpoint_activations=False)
    assert distance(task, train(task, **told, **changes), resident) < 1e-3


@pytest.mark.parametrize(
    ("first", "then"), [("host", "device"), ("device", "host"), ("host", "disk"), ("disk", "none")]
)
def test_a_run_is_taken_up_with_blocks_elsewhere(task: Path, first: str, then: str) -> None:
    """AdamW's own numbers follow to where it runs."""

    def place(where: str) -> dict[str, Any]:
        if where in ("host", "device"):
            return {"offload": "cpu", "optimizer_on": where}
        return {"offload": where, "checkpoint_activations": False if where == "none" else None}

    common: dict[str, Any] = {"max_steps": 4, "save_every": 1}
    output = task / "cut"
    with pytest.raises(Stopped):
        train(task, output, stop=iter([None, 15]).__next__, **common, **place(first))
    found = train(task, output, resume=True, **common, **place(then))
    # Two further steps tell the last bits of bf16 weights apart; with moments lost it would be most of an update.
    assert distance(task, found, train(task, **common, **place(first))) < 0.05
