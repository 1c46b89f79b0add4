"""The demonstration shows a real difference."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

COVERS = ["sculptor.jobs.demo_model"]


def test_protection_keeps_what_plain_training_loses(cli: Callable[..., Result], tmp_path: Path) -> None:
    found = cli("demo", "--output", tmp_path / "demo", "--json")
    assert found.code == 0, found.err
    before, plain, weights, own, protected = found.json["rows"]
    assert before["kept"] > 0.98
    assert before["learned"] < 0.05
    assert plain["learned"] > 0.95
    assert min(row["learned"] for row in (weights, own, protected)) > 0.9
    assert plain["kept"] < 0.6
    assert weights["kept"] > plain["kept"] + 0.3
    assert own["kept"] > plain["kept"] + 0.3
    assert protected["kept"] > 0.98
    assert all(row["verified"] is True for row in (weights, own, protected))
    assert found.json["leak"] < 1e-6
    assert json.loads((tmp_path / "demo" / "protected" / "config.json").read_text())["architectures"]
    again = cli("demo", "--output", tmp_path / "demo")
    assert again.code == 1
    assert "exists already" in again.err


def test_what_others_put_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sculptor.checkpoint.written import begin, note
    from sculptor.tasks import demo as task

    def failing(model: Path, *_: object, **__: object) -> None:
        output = model.parent
        (output / "notes.txt").write_text("mine")
        (output / "mine").mkdir()
        begun = output / "plain.partial"  # as staging keeps a state that is worth it
        begun.mkdir()
        begin(begun, "train")
        note(begun / "state.json")
        (begun / "state.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("sculptor.jobs.demo_model._PRETRAIN_STEPS", 2)
    monkeypatch.setattr(task, "analyze", failing)
    with pytest.raises(KeyboardInterrupt):
        task.demo(tmp_path / "demo")
    assert sorted(path.name for path in (tmp_path / "demo").rglob("*")) == ["mine", "notes.txt"]
    monkeypatch.setattr(task, "_measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.demo(tmp_path / "again")
    assert not (tmp_path / "again").exists()
