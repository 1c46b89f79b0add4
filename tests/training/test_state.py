"""Saved states: complete or not there, and only taken up by the run they belong to."""

from pathlib import Path

import pytest
import torch

from sculptor.errors import OutputError
from sculptor.training.state import Position, StateStore

KEY = {"learning_rate": 1e-3, "data": ["x"]}
PRINTS = {"w": [0.5, -0.25]}


def test_round_trip_keeps_only_the_newest(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state", KEY, PRINTS)
    assert store.load() is None
    for step in (1, 2):
        store.save(Position(step, best_step=1, best_loss=0.5), {"a": torch.full((3,), step)}, {"a": torch.zeros(3)})
    found = store.load()
    assert found is not None
    position, tensors, best = found
    assert position == Position(2, best_step=1, best_loss=0.5)
    assert tensors["a"].tolist() == [2, 2, 2]
    assert best is not None
    assert [path.name for path in store.directory.iterdir()] == ["step-00000002"]


def test_a_half_written_state_is_ignored(tmp_path: Path) -> None:
    store = StateStore(tmp_path, KEY, PRINTS)
    store.save(Position(1), {"a": torch.zeros(3)}, None)
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "state.safetensors").write_bytes(b"half")
    found = store.load()
    assert found is not None
    assert found[0].step == 1


def test_other_settings_and_other_bases_are_refused(tmp_path: Path) -> None:
    StateStore(tmp_path, KEY, PRINTS).save(Position(1), {"a": torch.zeros(3)}, None)
    with pytest.raises(OutputError, match=r"other settings .learning_rate; learning_rate was 0.001, now 0.1"):
        StateStore(tmp_path, KEY | {"learning_rate": 0.1}, PRINTS).load()
    with pytest.raises(OutputError, match="belong to other bases"):
        StateStore(tmp_path, KEY, {"w": [0.5, 0.25]}).load()
    with pytest.raises(OutputError, match="belong to other bases"):
        StateStore(tmp_path, KEY, {"v": [0.5, -0.25]}).load()
    assert StateStore(tmp_path, KEY, {"w": [0.5 + 1e-6, -0.25]}).load() is not None
