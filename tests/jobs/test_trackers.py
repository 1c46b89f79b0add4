"""`--report-to`: what a tracker is told is what stands in metrics.jsonl."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor.errors import OutputError, SettingsError
from sculptor.jobs.trackers import Trackers, check_folder, check_trackers


@pytest.mark.slow
def test_tensorboard_is_told_what_the_metrics_say(tmp_path: Path, cli: Callable[..., Result]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows(count=8))
    assert cli("analyze", model, "-o", tmp_path / "a", "--preserve", 0.5, "--device", "cpu").code == 0
    train = ("train", model, "--subspaces", tmp_path / "a", "--data", rows, "--max-steps", 3, "--device", "cpu")
    found = cli(*train, "--eval-data", rows, "-o", tmp_path / "t", "--report-to", "tensorboard")
    assert found.code == 0, found.err
    assert cli(*train, "--eval-data", rows, "-o", tmp_path / "plain").code == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("t", "plain")]
    assert same[0] == same[1]
    events = EventAccumulator(str(tmp_path / "runs" / "t"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "eval_loss", "relative_rate", "grad_norm"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines if name in line]
    assert len(events.Scalars("tokens_per_second")) == 2
    missing = next(name for name in ("trackio", "mlflow", "wandb") if name not in sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, missing, None)
        refused = cli(*train, "-o", tmp_path / "no", "--report-to", missing)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"pip install {missing}" in refused.err
    assert not list(tmp_path.glob("no*"))


def test_others_are_told_the_name_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A faked wandb; accelerate's own tracker speaks to it."""
    from accelerate.utils import LoggerType

    told: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step=None, **_: told.append((step, values)), finish=lambda: told.append("finished")
    )
    wandb: Any = ModuleType("wandb")
    wandb.init = lambda **given: told.append(given) or run
    wandb.config = SimpleNamespace(update=lambda values, **_: told.append(values))
    wandb.__spec__ = SimpleNamespace(loader=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    check_trackers(["wandb"])
    trackers = Trackers(["wandb"], tmp_path / "tuned", {"seed": 1, "also_train": ()}, torch.device("cpu"))
    trackers.log({"step": 1, "loss": 2.0, "tokens": 10, "seconds": 1.0})
    trackers.log({"step": 2, "loss": 1.0, "tokens": 10, "seconds": 1.5})
    trackers.log({"step": 2, "harm": 0.5, "harm_scale": 0.75})
    trackers.close()
    assert told[0] == {"project": "sculptor", "name": "tuned"}
    assert told[-4:-2] == [(1, {"loss": 2.0}), (2, {"loss": 1.0, "tokens_per_second": 20.0})]
    assert told[-2:] == [(2, {"harm": 0.5, "harm_scale": 0.75}), "finished"]


def test_trackers_write_into_nothing_that_is_read_or_made(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(SettingsError, match=r"its files go to .*runs, which is the output"):
        check_folder(tmp_path / "runs", [])
    with pytest.raises(OutputError, match=r"lies in the input .*runs"):
        check_folder(tmp_path / "out", [tmp_path / "runs"])
    check_folder(tmp_path / "out", [tmp_path / "model"])
