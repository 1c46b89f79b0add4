"""Harm in passes that are recorded: what `measure_harm` says of the model as it is, whenever it is asked."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint

from sculptor import AnalyzeSettings, TrainSettings, analyze
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.model import harm
from sculptor.model.harm import measure_harm, sample_losses
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.samples import Samples, draw_samples
from sculptor.progress import silent
from sculptor.training.protect import protect, protected_matrices
from sculptor.training.recorded import Graphs
from sculptor.training.recorded_harm import RecordedLosses

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Recorder:
    """On a GPU a CUDA graph, else the function itself; counts both."""

    def __init__(self, device: str) -> None:
        self.recorded = self.played = 0
        self._graphs = Graphs(torch.device(device)) if device == "cuda" else None

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        play = run if self._graphs is None else self._graphs.record(run)
        if self._graphs is None:
            run()

        def counted() -> None:
            self.played += 1
            play()

        return counted


def prepare(path: Path, device: str) -> tuple[LoadedModel, Samples]:
    """A protected model, and what it says."""
    save_checkpoint(path / "model", "llama", dtype=torch.float32)
    analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5))
    loaded = load_model(open_checkpoint(path / "model"), torch.device(device))
    samples = draw_samples(loaded, 32, 1, silent)
    protect(loaded.model, path / "archive", fold="manual")
    return loaded, samples


def expire(loaded: LoadedModel) -> None:
    for matrix in protected_matrices(loaded.model):
        matrix.refresh()


def move(loaded: LoadedModel, seed: int) -> None:
    """An optimizer's step."""
    generator = torch.Generator(loaded.device).manual_seed(seed)
    with torch.no_grad():
        for matrix in protected_matrices(loaded.model):
            for a in matrix.coordinates.trained:
                a.add_(0.1 * torch.randn(a.shape, generator=generator, device=a.device))
    expire(loaded)


@pytest.mark.parametrize("device", DEVICES)
def test_it_follows_the_model(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, samples = prepare(tmp_path, device)
    monkeypatch.setattr(harm, "_LOGITS", {})  # passes of a few rows
    recorder = Recorder(device)
    losses = RecordedLosses(loaded, TrainSettings(precision="float32"), lambda: expire(loaded), recorder.record)
    seen = []
    for seed in range(3):
        found = measure_harm(loaded.model, samples.all, loaded.device, pad_id=loaded.pad_id, losses=losses)
        wanted = measure_harm(loaded.model, samples.all, loaded.device, pad_id=loaded.pad_id)
        assert found.nats == pytest.approx(wanted.nats, rel=1e-4, abs=1e-6)
        assert (found.error, found.num_tokens) == (pytest.approx(wanted.error, rel=1e-3, abs=1e-6), wanted.num_tokens)
        assert found.first == pytest.approx(wanted.first, rel=1e-3, abs=1e-6)
        seen.append(found.nats)
        move(loaded, seed)
    passes = -(-len(samples.all) // 8)
    assert passes > 1
    assert (recorder.recorded, recorder.played) == (passes, 3 * passes)
    assert seen[0] < 1e-6 < seen[1] != seen[2]
    losses.close()
    chosen = samples.all[:8]
    expected = sample_losses(loaded.model, chosen, loaded.device, loaded.pad_id)
    torch.testing.assert_close(losses(chosen), expected)
    assert recorder.recorded == passes


def test_what_cannot_be_recorded_is_measured_as_ever(tmp_path: Path) -> None:
    """It is tried once; a recording that fails leaves nothing behind that was folded for it."""
    loaded, samples = prepare(tmp_path, "cpu")
    tried = []

    def fails(run: Callable[[], None]) -> Callable[[], None]:
        tried.append(run)
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    losses = RecordedLosses(loaded, TrainSettings(precision="float32"), lambda: expire(loaded), fails)
    for seed in range(2):
        found = measure_harm(loaded.model, samples.all, loaded.device, losses=losses)
        assert found == measure_harm(loaded.model, samples.all, loaded.device)
        move(loaded, seed)
    assert len(tried) == 1


def test_passes_that_take_long_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, samples = prepare(tmp_path, "cpu")
    monkeypatch.setattr("sculptor.training.recorded_harm.LONG", 0)
    recorder = Recorder("cpu")
    losses = RecordedLosses(loaded, TrainSettings(precision="float32"), lambda: expire(loaded), recorder.record)
    assert measure_harm(loaded.model, samples.all, loaded.device, losses=losses) == measure_harm(
        loaded.model, samples.all, loaded.device
    )
    assert not recorder.recorded
