"""What goes wrong must not go on: lost stores, replaced inputs, slots that were not filled."""

from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file

import sculptor
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.model.load import load_streamed
from sculptor.planning import placement
from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Staging, Ticket, Transfers

COVERS = ["sculptor.tasks.stream"]
CPU = torch.device("cpu")


def fail() -> None:
    raise OSError("the disk is full")


def test_after_a_lost_store_nothing_is_loaded_or_called_done() -> None:
    transfers = Transfers(CPU, threads=True)
    with pytest.raises(OSError, match="the disk is full"):
        transfers.store(fail)
    with pytest.raises(OSError, match="the disk is full"):
        transfers.drain()
    with pytest.raises(OSError, match="the disk is full"):
        transfers.load(lambda: None)


def test_a_slot_that_could_not_be_filled_holds_nothing() -> None:
    def fill(block: int, slot: Slot) -> list[Ticket]:
        if block == 1:
            fail()
        return []

    slots = Slots(1, 8, CPU, fill)
    slots.enter(0)
    with pytest.raises(OSError, match="the disk is full"):
        slots.enter(1)
    assert slots.find(0) is None
    assert slots.find(1) is None


def test_closing_twice_is_closing_once() -> None:
    staging = Staging(CPU, 8)
    staging.close()
    staging.close()


def test_inputs_that_a_later_forward_replaced_are_not_used(tmp_path: Path, generator: torch.Generator) -> None:
    loaded = load_streamed(open_checkpoint(save_checkpoint(tmp_path / "model")), CPU, "cpu", keep_inputs=False)
    loaded.model.requires_grad_(True)
    first, second = (
        loaded.model(input_ids=torch.randint(4, 40, (2, 6), generator=generator)).logits.sum() for _ in range(2)
    )
    with pytest.raises(RuntimeError, match="call backward before the next forward"):
        first.backward()
    del second


def test_a_rate_of_zero_is_a_rate(tmp_path: Path, generator: torch.Generator) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    settings = sculptor.TrainSettings(offload="cpu", learning_rate=1e-2, device="cpu")
    with sculptor.stream(tmp_path / "model", tmp_path / "archive", settings) as streamed:
        name = next(iter(streamed.archive))
        for rate, changed in ((0.0, False), (None, True)):
            ids = torch.randint(4, 40, (2, 6), generator=generator)
            streamed.backward(streamed.model(input_ids=ids, labels=ids).loss)
            assert streamed.step(rate) > 0
            coordinates = streamed.updates.coordinates(name)
            assert coordinates is not None
            assert any(bool(a.any()) for a in coordinates) == changed


def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path, generator: torch.Generator) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    settings = sculptor.TrainSettings(offload="cpu", learning_rate=1e-2, device="cpu")
    ids = torch.randint(4, 40, (2, 6), generator=generator)
    with sculptor.stream(tmp_path / "model", tmp_path / "archive", settings) as streamed:
        streamed.backward(streamed.model(input_ids=ids, labels=ids).loss * float("nan"))
        with pytest.raises(sculptor.SculptorError, match="gradient norm nan: not finite"):
            streamed.step()
        streamed.save(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_plain_backward_counts_the_same(tmp_path: Path, generator: torch.Generator) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    ids = torch.randint(4, 40, (2, 2, 6), generator=generator)
    norms = []
    for plain in (False, True):
        settings = sculptor.TrainSettings(offload="disk", learning_rate=1e-2, device="cpu")
        with sculptor.stream(tmp_path / "model", tmp_path / "archive", settings, directory=tmp_path) as streamed:
            for part in ids:
                loss = streamed.model(input_ids=part, labels=part).loss
                if plain:
                    loss.backward()
                else:
                    streamed.backward(loss)
            norms.append((streamed.step(), float(streamed.model(input_ids=ids[0], labels=ids[0]).loss.detach())))
        with pytest.raises(sculptor.SculptorError, match="is closed"):
            streamed.step()
    assert norms[0] == norms[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "model"]


def test_a_loop_of_ones_own_learns_beforehand_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    monkeypatch.setattr(placement, "available_memory", lambda _: (1e5, 1e5))
    monkeypatch.setattr(placement, "available_disk", lambda _: 1e4)
    expected = {
        "cpu": r'host memory \(0.1 MB free\); use offload="disk"',
        "disk": r"disk \(0.0 MB free\); free some space",
    }
    for offload, what in expected.items():
        settings = sculptor.TrainSettings(offload=offload, device="cpu")  # type: ignore[arg-type]
        with pytest.raises(sculptor.SculptorError, match=rf"--offload {offload} needs [\d.]+ [MG]B of {what}"):
            sculptor.stream(tmp_path / "model", tmp_path / "archive", settings)
        monkeypatch.setattr(placement, "available_memory", lambda _: (1e10, 1e10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "model"]


def test_a_loop_of_ones_own_refuses_what_would_have_no_effect(tmp_path: Path) -> None:
    settings = sculptor.TrainSettings(offload="cpu", also_train=("norm",), save_dtype="float32", device="cpu")
    with pytest.raises(sculptor.SculptorError, match=r"without effect in a loop of your own .*also_train, save_dtype"):
        sculptor.stream(tmp_path / "model", tmp_path / "archive", settings)
    with pytest.raises(sculptor.SculptorError, match=r"without effect .*: directory"):
        sculptor.stream(tmp_path, tmp_path, sculptor.TrainSettings(offload="cpu"), directory=tmp_path)


def test_a_loop_of_ones_own_makes_the_directory_for_its_files(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    sculptor.analyze(tmp_path / "model", tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5))
    settings = sculptor.TrainSettings(offload="disk", learning_rate=1e-2, device="cpu")
    with sculptor.stream(tmp_path / "model", tmp_path / "archive", settings, directory=tmp_path / "a" / "b"):
        assert list((tmp_path / "a" / "b").iterdir())
    assert not list((tmp_path / "a" / "b").iterdir())
