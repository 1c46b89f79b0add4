"""state.json wrong in every way, and state files whose bytes changed: each is one line, and none is taken up in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from mutations import mutations

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.checkpoint.tensors import read_header
from sculptor.errors import OutputError, Stopped
from sculptor.training.state import Position, StateStore, _State
from sculptor.training.stepping.updates import tensors_of
from sculptor.validation import sign

KEY = {"learning_rate": 1e-3, "data": ["x"]}
PRINTS = {"w": [0.5, -0.25]}
FULL = Position(
    4, best_step=3, best_loss=0.5, metrics_bytes=120, first_loss=1.5, last_loss=0.75, tokens=640, seconds=2.5
)


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    """A store that holds one state, with the best parameters, every field given."""
    made = StateStore(tmp_path / "state", KEY, PRINTS)
    made.save_best(3, tensors_of({"w.A0": torch.full((3, 2), 2.0)}))
    made.save(FULL, tensors_of({"w.A0": torch.ones(3, 2), "w.A0.exp_avg": torch.zeros(3, 2)}))
    return made


def state_file(store: StateStore) -> Path:
    return store.directory / "step-00000004" / "state.json"


def signed(content: dict[str, Any]) -> str:
    """As it would be if it had been written like this."""
    try:
        return json.dumps(content | {"sha256": sign(content)})
    except ValueError:  # NaN and infinity, which no signature is made of
        return json.dumps(content | {"sha256": "0" * 64})


def unsigned(store: StateStore) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(state_file(store).read_text())
    content.pop("sha256")
    return content


def flip(path: Path, offset: int) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_every_field_wrong_in_every_way_is_one_line(store: StateStore) -> None:
    count = refused = 0
    for what, changed, must_fail in mutations(_State, unsigned(store), {}):
        count += 1
        state_file(store).write_text(signed(changed))
        try:
            found = StateStore(store.directory, KEY, PRINTS).load()
        except OutputError as error:
            refused += 1
            message = str(error)
            assert message.isprintable(), what
            assert len(message) < 1500, what
            assert "--overwrite" in message, what
        else:
            assert not must_fail, what
            assert found is not None, what
    assert count > 100
    assert 100 < refused < count, "some values are others, but not wrong"


def test_a_state_without_a_field_that_has_a_default_is_taken_up(store: StateStore) -> None:
    content = unsigned(store)
    content["position"] = {"step": 4}
    state_file(store).write_text(signed(content))
    found = StateStore(store.directory, KEY, PRINTS).load()
    assert found is not None
    assert found[0] == Position(4)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["position"].update(step=3),
        lambda content: content["position"].update(last_loss=0.5),
        lambda content: content["key"].update(learning_rate=1e-2),
        lambda content: content["digests"].update({"w.A0": "0" * 64}),
        lambda content: content["fingerprints"].update(w=[0.5, -0.2500001]),
        lambda content: content.pop("sha256"),
        lambda content: content.update(sha256="0" * 64),
        lambda content: content.update(sha256=None),
        lambda content: content.update(surprise=1),
    ],
)
def test_an_unsigned_change_is_noticed(store: StateStore, change: Any) -> None:
    content = json.loads(state_file(store).read_text())
    change(content)
    state_file(store).write_text(json.dumps(content))
    with pytest.raises(
        OutputError, match=r"state.json: has changed since it was written .its digest differs.; pass --ove"
    ):
        StateStore(store.directory, KEY, PRINTS).load()


def test_order_and_spacing_are_no_change(store: StateStore) -> None:
    content = json.loads(state_file(store).read_text())
    state_file(store).write_text(json.dumps(dict(reversed(content.items())), indent=7))
    found = StateStore(store.directory, KEY, PRINTS).load()
    assert found is not None
    assert found[0] == FULL


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "3", "\ud800", '{"key": NaN}', ""])
def test_anything_else_is_one_line(store: StateStore, text: str) -> None:
    state_file(store).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(OutputError, match=r"state.json: damaged .*pass --overwrite to start anew") as caught:
        StateStore(store.directory, KEY, PRINTS).load()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["digests", "best_digests"])
def test_names_have_no_control_characters(store: StateStore, name: str) -> None:
    content = unsigned(store)
    content[name] = {"w\x1b[31m\n": "0" * 64}
    state_file(store).write_text(signed(content))
    with pytest.raises(OutputError, match="damaged") as caught:
        StateStore(store.directory, KEY, PRINTS).load()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["w.A0", "w.A0.exp_avg"])
def test_a_flipped_byte_is_noticed_by_the_tensor_s_name(store: StateStore, name: str) -> None:
    path = state_file(store).with_name("state.safetensors")
    infos, _ = read_header(path, OutputError)
    flip(path, infos[name].offset + infos[name].num_bytes - 1)
    found = StateStore(store.directory, KEY, PRINTS).load()
    assert found is not None
    with pytest.raises(OutputError, match=rf"tensor {name} has changed since it was saved .* --overwrite"):
        found[1][name]
    (other,) = set(infos) - {name}
    assert found[1][other].shape == (3, 2)


def test_a_flipped_byte_of_the_best_is_noticed(store: StateStore) -> None:
    path = store.directory / "best-00000003.safetensors"
    flip(path, -1)
    again = StateStore(store.directory, KEY, PRINTS)
    assert again.load() is not None
    with pytest.raises(OutputError, match=r"best-00000003.*tensor w.A0 has changed since it was saved"):
        again.load_best(3)["w.A0"]


def test_tensors_under_other_names_are_not_taken_for_those_that_were_saved(store: StateStore) -> None:
    path = state_file(store).with_name("state.safetensors")
    path.write_bytes(path.read_bytes().replace(b"exp_avg", b"exp_abc"))
    with pytest.raises(OutputError, match=r"this saved state is damaged .*does not hold the tensors that were saved"):
        StateStore(store.directory, KEY, PRINTS).load()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its second step."""
    path = tmp_path_factory.mktemp("stopped")
    save_checkpoint(path / "model")
    write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    polls = iter([None, 15])
    with pytest.raises(Stopped):
        resumed(path, resume=False, stop=lambda: next(polls))
    return path


def resumed(path: Path, **more: Any) -> Any:
    settings = TrainSettings(max_steps=4, eval_every=1, batch_size=4, device="cpu")
    rows = [path / "rows.jsonl"]
    arguments: dict[str, Any] = {"eval_data": rows, "resume": True} | more
    return train(path / "model", path / "archive", rows, path / "out", settings, **arguments)


def test_a_run_does_not_go_on_with_changed_bytes(stopped: Path) -> None:
    directory = stopped / "out.partial" / "state" / "step-00000002"
    path = directory / "state.safetensors"
    infos, _ = read_header(path, OutputError)
    before = path.read_bytes()
    for ending in (".A0", ".A0.exp_avg", ".A0.exp_avg_sq", "random.cpu"):
        name = next(name for name in infos if name.endswith(ending))
        flip(path, infos[name].offset)
        with pytest.raises(OutputError, match=rf"tensor {name} has changed since it was saved"):
            resumed(stopped)
        path.write_bytes(before)
    content = json.loads((directory / "state.json").read_text())
    written = json.dumps(content)
    content["position"]["step"] = 1
    (directory / "state.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match="has changed since it was written"):
        resumed(stopped)
    (directory / "state.json").write_text(written)
    assert not (stopped / "out").exists()
    assert resumed(stopped).loop.steps == 4, "and goes on with those that were saved"
