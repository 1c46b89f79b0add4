"""How a step is split: what the settings say is done, and else the fastest of what fits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import SculptorError, Stopped
from sculptor.planning import splits
from sculptor.planning.footprints import Footprint, Workload, footprints
from sculptor.planning.splits import Split, candidates, choose_split, default_split

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"batch_size": 64, **changes})


def test_what_is_asked_for_is_done() -> None:
    for device in (CUDA, CPU):
        for again in (True, False):
            asked = settings(micro_batch_size=4, checkpoint_activations=again)
            assert candidates(asked, 64, 100, device) == [Split(4, again)]
    assert candidates(settings(micro_batch_size=100), 64, 100, CPU) == [Split(64, False)]
    fused = settings(optimizer_mode="fused", clip=0, offload="cpu")
    assert {split.rows for split in candidates(fused, 64, 100, CUDA)} == {64}


def test_a_cpu_has_its_default() -> None:
    assert candidates(settings(), 64, 1000, CPU) == [Split(8, False)]
    assert candidates(settings(), 5, 100, CPU) == [Split(5, False)]
    assert default_split(settings(), 64, CUDA) == Split(8, True)


def test_the_fastest_comes_first() -> None:
    found = candidates(settings(), 64, 1024, CUDA)
    assert found[:3] == [Split(64, False), Split(32, False), Split(16, False)]  # no fewer tokens than keep a GPU busy
    assert found[3:] == [Split(rows, True) for rows in (64, 32, 16, 8, 4, 2, 1)]
    assert candidates(settings(), 3, 10, CUDA) == [Split(3, False), *(Split(rows, True) for rows in (3, 2, 1))]


@pytest.fixture
def plans_of(tmp_path: Path) -> Any:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    architecture = inspect_architecture(checkpoint)

    def plans(split: Split) -> dict[str, Footprint]:
        work = split.workload(Workload(64 * 1024, 1, row=1024), 64)
        return footprints(checkpoint, architecture, (), CUDA, work)

    return plans


def test_the_first_that_fits_is_taken(plans_of: Any) -> None:
    needs = {split: sum(plans_of(split)["none"].device.values()) for split in candidates(settings(), 64, 1024, CUDA)}
    taken = [
        choose_split(plans_of, settings(), 64, 1024, CUDA, memory)
        for memory in (1e15, *(2 * n for n in needs.values()))
    ]
    assert taken[0] == Split(64, False)
    order = list(needs)
    assert [order.index(split) for split in taken[1:]] == sorted(order.index(split) for split in taken[1:])
    for split, memory in zip(taken[1:], (2 * n for n in needs.values()), strict=True):
        assert needs[split] <= memory
    assert choose_split(plans_of, settings(), 64, 1024, CUDA, 1.0) == Split(8, True)  # `choose` says what is lacking


def test_short_rows_go_together_on_a_cpu() -> None:
    """A pass more costs more than padding; long ones and a GPU have no use for that."""
    found = [candidates(settings(), 40, longest, torch.device("cpu")) for longest in (1024, 128, 100, 64, 20)]
    assert found == [[Split(rows, False)] for rows in (8, 8, 10, 16, 40)]
    given = candidates(settings(micro_batch_size=4), 40, 20, torch.device("cpu"))
    assert given == [Split(4, False)]
    assert default_split(settings(), 40, CUDA, 20) == Split(8, True)


def test_streamed_blocks_are_always_computed_again(plans_of: Any) -> None:
    assert choose_split(plans_of, settings(offload="cpu"), 64, 1024, CUDA, 1e15) == Split(64, True)


def test_the_split_of_a_run_is_noted_and_has_to_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    chosen = TrainSettings(max_steps=4, save_every=1, batch_size=12, device="cpu")
    stop = iter([None, 15]).__next__
    with pytest.raises(Stopped):
        train(model, tmp_path / "archive", [rows], tmp_path / "out", chosen, stop=stop)
    monkeypatch.setattr(splits, "MICRO_ROWS", 3)  # as on a device of another size
    monkeypatch.setattr(splits, "_SHORT", 0)
    with pytest.raises(SculptorError, match="micro_batch_size"):
        train(model, tmp_path / "archive", [rows], tmp_path / "out", chosen, resume=True)
    monkeypatch.undo()
    train(model, tmp_path / "archive", [rows], tmp_path / "out", chosen, resume=True)
    assert '"micro_batch_size": 12' in (tmp_path / "out" / "sculptor.json").read_text()
