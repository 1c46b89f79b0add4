"""Updates of blocks whose copies have threads of their own, as the disk tier has them beside a GPU."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file
from torch import Tensor

import sculptor
from sculptor.streaming.regions import Region, Scratch
from sculptor.streaming.transfers import Transfers

TRAINER = threading.main_thread()


def train(tmp_path: Path, output: str, **changes: Any) -> dict[str, Tensor]:
    """The merged tensors of a run of several micro-batches a step, which read again what was stored."""
    values: dict[str, Any] = {
        "max_steps": 3, "batch_size": 6, "micro_batch_size": 2, "learning_rate": 1e-2, "clip": 0.1, "save_dtype": "float32",
    }  # fmt: skip
    settings = sculptor.TrainSettings(**(values | changes))
    data = [tmp_path / "rows.jsonl"]
    sculptor.train(tmp_path / "model", tmp_path / "archive", data, tmp_path / output, settings)
    return load_file(tmp_path / output / "model.safetensors")


def test_what_threads_store_is_what_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a block's weights is made once, by the thread that trains, and before anybody writes there.

    Where the thread of a lane made it as well, the one that came second emptied it, behind what was written.
    """
    save_checkpoint(tmp_path / "model", "t5")  # two stacks, four blocks
    write_rows(tmp_path / "rows.jsonl", task_rows())
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    resident = train(tmp_path, "resident", offload="none")
    begin, region = Transfers.__init__, Scratch.region
    made: list[tuple[str, bool]] = []
    lanes: list[ThreadPoolExecutor] = []

    def with_threads(self: Transfers, device: torch.device, threads: bool) -> None:
        begin(self, device, threads)
        assert threads
        self._threads = {name: ThreadPoolExecutor(1) for name in ("load", "store")}
        lanes.extend(self._threads.values())

    def late(self: Scratch, name: str, num_bytes: int) -> Region:
        here = threading.current_thread() is TRAINER
        if here and name.startswith("weights"):  # as late as can be: what lanes were given so far is over
            for thread in lanes:
                thread.submit(lambda: None).result()
        made.append((name, here))
        return region(self, name, num_bytes)

    monkeypatch.setattr(Transfers, "__init__", with_threads)
    monkeypatch.setattr(Scratch, "region", late)
    streamed = train(tmp_path, "streamed", offload="disk")
    assert all(torch.equal(streamed[name], resident[name]) for name in resident)
    weights = [each for each in made if each[0].startswith("weights")]
    assert len(weights) == len({name for name, _ in weights}) == 4
    assert all(here for _, here in weights)
