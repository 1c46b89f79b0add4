"""How calibration rows are put together: as many as fit, and on a large GPU more."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, analyze
from sculptor.analysis import calibration, padded
from sculptor.analysis.padded import activation_bytes, make_batches
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.batches import Batch
from sculptor.data.examples import Example
from sculptor.model.load import LoadedModel, load_model


@pytest.mark.parametrize(("total", "expected"), [(12e9, 2e9), (24e9, 2e9), (80e9, 5e9), (144e9, 9e9)])
def test_a_large_gpu_takes_more_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, total: float, expected: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    assert activation_bytes(torch.device("cuda")) == expected
    assert activation_bytes(torch.device("cuda"), 24.0) == 2e9, "a limit is a limit"
    assert activation_bytes(torch.device("cpu")) == activation_bytes(torch.device("cpu"), 64.0) == 5e8


def test_every_row_is_in_one_batch_and_batches_hold_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "llama", "llama")), torch.device("cpu"))
    examples = [Example((5,) * length, (5,) * length) for length in (3, 9, 5, 9, 2, 7)]
    monkeypatch.setattr(padded, "_batch_tokens", lambda loaded, activations: 20)
    sizes = [tuple(batch.attention_mask.sum(dim=1).tolist()) for batch in make_batches(loaded, examples, seed=0)]
    assert sizes == [(9, 9), (7, 5), (3, 2)]
    asked = []
    monkeypatch.setattr(padded, "_batch_tokens", lambda loaded, activations: asked.append(activations) or 1)
    assert len(list(make_batches(loaded, examples, 0, 24.0))) == len(examples), "a row is never split"
    assert asked == [5e8]


def test_a_limit_of_an_analysis_reaches_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows(count=4))
    asked: list[float | None] = []

    def batches(loaded: LoadedModel, examples: Sequence[Example], seed: int, limit: float | None) -> Iterator[Batch]:
        asked.append(limit)
        return make_batches(loaded, examples, seed, limit)

    monkeypatch.setattr(calibration, "make_batches", batches)
    for limit in (3.0, None):
        settings = AnalyzeSettings(
            basis="curvature", data=(str(rows),), device="cpu", device_memory=limit, samples=False
        )
        analyze(model, tmp_path / f"archive-{limit}", settings)
    assert asked == [3.0, None]
