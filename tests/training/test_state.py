"""Saved states: complete or not there, and only taken up by the run they belong to."""

from pathlib import Path

import pytest
import torch

from sculptor.checkpoint.run_keys import key_difference
from sculptor.errors import OutputError
from sculptor.training.state import Position, StateStore
from sculptor.training.stepping.updates import tensors_of

COVERS = ["sculptor.training.stepping.updates"]
KEY = {"learning_rate": 1e-3, "data": ["x"]}
PRINTS = {"w": [0.5, -0.25]}


def test_round_trip_keeps_only_the_newest_and_the_best(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state", KEY, PRINTS)
    assert store.load() is None
    store.save_best(1, tensors_of({"a": torch.zeros(3)}))
    store.save(Position(1, best_step=1, best_loss=0.5), tensors_of({"a": torch.ones(3)}))
    store.save_best(2, tensors_of({"a": torch.full((3,), 5.0)}))
    assert store.load_best(1)["a"].tolist() == [0, 0, 0], "the one a state names stays until the next state"
    store.save(Position(2, best_step=2, best_loss=0.25), tensors_of({"a": torch.full((3,), 2.0)}))
    found = store.load()
    assert found is not None
    position, tensors = found
    assert position == Position(2, best_step=2, best_loss=0.25)
    assert tensors["a"].tolist() == [2, 2, 2]
    assert store.load_best(2)["a"].tolist() == [5, 5, 5]
    assert sorted(path.name for path in store.directory.iterdir()) == ["best-00000002.safetensors", "step-00000002"]


def test_a_missing_best_is_an_error(tmp_path: Path) -> None:
    store = StateStore(tmp_path, KEY, PRINTS)
    store.save(Position(1, best_step=1, best_loss=0.5), tensors_of({"a": torch.ones(3)}))
    with pytest.raises(OutputError, match="best-00000001"):
        store.load()


def test_a_half_written_state_is_ignored(tmp_path: Path) -> None:
    store = StateStore(tmp_path, KEY, PRINTS)
    store.save(Position(1), tensors_of({"a": torch.zeros(3)}))
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "state.safetensors").write_bytes(b"half")
    found = store.load()
    assert found is not None
    assert found[0].step == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("state.json", b"{"), ("state.json", b"[]"), ("state.safetensors", b"half"), ("state.safetensors", None)],
)
def test_a_damaged_state_says_what_to_do(tmp_path: Path, name: str, content: bytes | None) -> None:
    store = StateStore(tmp_path, KEY, PRINTS)
    store.save(Position(1), tensors_of({"a": torch.zeros(3)}))
    if content is None:
        (tmp_path / "step-00000001" / name).unlink()
    else:
        (tmp_path / "step-00000001" / name).write_bytes(content)
    with pytest.raises(OutputError, match=r"step-00000001.*pass --overwrite to start anew"):
        store.load()


def test_other_settings_and_other_bases_are_refused(tmp_path: Path) -> None:
    StateStore(tmp_path, KEY, PRINTS).save(Position(1), tensors_of({"a": torch.zeros(3)}))
    assert key_difference({"threads": 2, "epochs": 5}, {"threads": 1, "epochs": 5}) == (
        "threads; threads was 2, now 1: set OMP_NUM_THREADS=2"
    )
    with pytest.raises(OutputError, match=r"other settings .learning_rate; learning_rate was 0.001, now 0.1"):
        StateStore(tmp_path, KEY | {"learning_rate": 0.1}, PRINTS).load()
    with pytest.raises(OutputError, match="belong to other bases"):
        StateStore(tmp_path, KEY, {"w": [0.5, 0.25]}).load()
    with pytest.raises(OutputError, match="belong to other bases"):
        StateStore(tmp_path, KEY, {"v": [0.5, -0.25]}).load()
    assert StateStore(tmp_path, KEY, {"w": [0.5 + 1e-6, -0.25]}).load() is not None
