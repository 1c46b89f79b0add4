"""Passes that are recorded: the same training as without, for shapes that come often, and none of models that cannot be recorded.

On a CPU a recording is the function itself, on a GPU a CUDA graph.
"""

import inspect
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, write_rows
from safetensors.torch import load_file
from torch import nn

from sculptor import AnalyzeSettings, TrainSettings, analyze, train, verify
from sculptor.data.batches import collate
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import Stopped
from sculptor.training import loop, recorded
from sculptor.training.recorded import Graphs, RecordedPasses, Shape, often, shape_of, shape_of_rows, without_chance
from sculptor.training.stack import Stack

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
MANY: dict[str, Any] = {"max_steps": 12, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 3e-3, "carry": "keep"}


class Same:
    """Records nothing: what is played is what was run."""

    def __init__(self) -> None:
        self.played = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def play() -> None:
            self.played += 1
            run()

        return play


class Unable:
    """Of a model that cannot be recorded, which it finds out at the end."""

    tried = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.tried += 1
        run()
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", dtype=torch.float32)
    choose = random.Random(3)
    words = [f"w{i}" for i in range(8)]
    rows = [
        {
            "prompt": " ".join(choose.choices(words, k=choose.choice((3, 5, 5, 6, 6, 6, 9)))),
            "completion": choose.choice(words),
        }
        for _ in range(40)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    analyze(tmp_path / "model", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return tmp_path


def run(place: Path, name: str, device: str = "cpu", changes: dict[str, Any] | None = None, **options: Any) -> Any:
    told = MANY | {"device": device, "offload": "none", "checkpoint_activations": False} | (changes or {})
    return train(
        place / "model", place / "archive", [place / "rows.jsonl"], place / name, TrainSettings(**told), **options
    )


def record_by(monkeypatch: pytest.MonkeyPatch, recorder: Any, choose: Any = often) -> None:
    """Has loops on a CPU record, too."""

    def make(loaded: Any, settings: Any, as_base: Any, trained: Any, expire: Any, batches: Any) -> RecordedPasses:
        shapes = choose(shape_of_rows(rows, max(len(row.input_ids) for row in rows)) for rows in batches())
        return RecordedPasses(loaded, settings, trained, expire, shapes, recorder)

    monkeypatch.setattr(loop, "make_passes", make)


def updates(place: Path, name: str) -> dict[str, torch.Tensor]:
    base = load_file(place / "model" / "model.safetensors")
    return {key: value - base[key] for key, value in load_file(place / name / "model.safetensors").items()}


@pytest.mark.parametrize("changes", [{}, {"also_train": ("norm", "lm_head"), "clip_by": "matrix"}])
def test_it_is_the_same_training(place: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(place, "plain", changes=changes)
    recorder = Same()
    record_by(monkeypatch, recorder)
    run(place, "out", changes=changes)
    assert 0 < recorder.played < 24, "some shapes come often, and some do not"
    for key, value in updates(place, "plain").items():
        found = updates(place, "out")[key]
        assert (found - value).norm() <= 2e-4 * value.norm(), key
    assert plain.loop.last_loss < plain.loop.first_loss
    assert verify(place / "model", place / "out", place / "archive", device="cpu").passed


def test_a_step_may_be_recorded_in_part(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of a micro-batch that was run before the first recording stay."""
    run(place, "plain")
    recorder = Same()

    def second_of_the_first(shapes: Iterable[Shape]) -> frozenset[Shape]:
        first, second, *_ = shapes
        assert first != second
        return frozenset([second])

    record_by(monkeypatch, recorder, second_of_the_first)
    run(place, "out")
    assert recorder.played
    for key, value in updates(place, "plain").items():
        assert (updates(place, "out")[key] - value).norm() <= 2e-4 * value.norm(), key


def test_a_recording_folds_the_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was folded before it: else they would be the same for ever."""
    folded: list[int] = []
    fold = Stack._fold
    monkeypatch.setattr(Stack, "_fold", lambda self: (folded.append(1), fold(self))[1])

    class Twice(Same):
        def record(self, run: Callable[[], None]) -> Callable[[], None]:
            run()
            before = len(folded)
            run()
            assert len(folded) > before
            return super().record(run)

    record_by(monkeypatch, Twice())
    run(place, "out")
    assert folded


def test_one_that_goes_on_is_bit_for_bit_the_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_by(monkeypatch, Same())
    run(place, "whole")
    calls = iter([None] * 6 + [15])
    with pytest.raises(Stopped):
        run(place, "halted", stop=lambda: next(calls))
    run(place, "halted", resume=True)
    names = [path.name for path in sorted((place / "whole").glob("*.safetensors"))]
    assert names
    for name in names:
        assert (place / "whole" / name).read_bytes() == (place / "halted" / name).read_bytes()


def test_a_model_that_cannot_be_recorded_trains_as_ever(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place, "plain")
    recorder = Unable()
    record_by(monkeypatch, recorder)
    run(place, "out")
    assert recorder.tried == 1, "once is enough"
    whole, out = ((place / name / "model.safetensors").read_bytes() for name in ("plain", "out"))
    assert whole == out


def test_shapes_follow_from_rows_and_from_batches_alike(generator: torch.Generator) -> None:
    """What is decided before the run is what the run then meets."""
    sizes = torch.randint(2, 90, (200,), generator=generator).tolist()
    examples = []
    for size in sizes:
        labels = torch.randint(0, 9, (size,), generator=generator)
        kept = torch.rand(size, generator=generator) < 0.2
        examples.append(Example(tuple(range(size)), tuple(torch.where(kept, labels, IGNORED).tolist())))
    for start in range(0, 200, 8):
        rows = examples[start : start + 8]
        batch = collate(rows, 0)
        found, first = shape_of(batch)
        assert found == shape_of_rows(rows, batch.input_ids.shape[1])
        places = (batch.labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
        assert first >= 0
        assert first + found.columns <= found.length
        if len(places):
            assert first <= int(places[0])
            assert int(places[-1]) < first + found.columns


def test_shapes_that_come_often() -> None:
    shapes = [Shape(1, length, 32) for length in range(64, 64 * 20, 64) for _ in range(length // 64)]
    found = often(shapes)
    assert len(found) == 12
    assert {shape.length // 64 for shape in found} == set(range(8, 20))
    assert often([Shape(1, 64, 32)] * 3) == frozenset()


@GPU
def test_a_graph_is_the_pass(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU recordings are made by themselves; padding rows to 64 tokens makes all of one shape."""
    graphs: list[Graphs] = []
    monkeypatch.setattr(recorded, "Graphs", lambda device: graphs.append(Graphs(device)) or graphs[-1])
    run(place, "out", "cuda")
    assert len(graphs) == 1
    assert graphs[0]._pool is not None, "it has recorded"
    calls = iter([None] * 6 + [15])
    with pytest.raises(Stopped):
        run(place, "halted", "cuda", stop=lambda: next(calls))
    run(place, "halted", "cuda", resume=True)
    whole, halted = ((place / name / "model.safetensors").read_bytes() for name in ("out", "halted"))
    assert whole == halted
    monkeypatch.setattr(recorded, "_is_recordable", lambda *_: False)
    run(place, "plain", "cuda")
    for key, value in updates(place, "plain").items():
        found = updates(place, "out")[key]
        assert (found - value).norm() <= 0.05 * value.norm(), "to rounding of products in bfloat16"
    assert verify(place / "model", place / "out", place / "archive", device="cpu").passed


@GPU
def test_a_pass_with_dropout_is_not_recorded() -> None:
    module = nn.Dropout(0.5)
    x = torch.ones(64, device="cuda")
    before = torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match="random numbers"):
        Graphs(torch.device("cuda")).record(lambda: module(x))
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random])
def test_what_is_left_to_chance_is_not_recorded(draw: Callable[[], Any]) -> None:
    """Layers that are dropped: a recording would drop the same ones for ever."""
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="random numbers were drawn"), without_chance(torch.device("cpu")):
        draw()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    with without_chance(torch.device("cpu")):
        torch.ones(3).sum()


@pytest.mark.parametrize("device", DEVICES)
def test_only_causal_models_are_recorded(place: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL term, weights of tokens and recomputed activations are run as ever."""
    asked: list[bool] = []
    decide = recorded._is_recordable
    monkeypatch.setattr(recorded, "_is_recordable", lambda *told: asked.append(decide(*told)) or False)
    run(place, "a", device)
    run(place, "b", device, {"token_weights": "entropy"})
    run(place, "c", device, {"checkpoint_activations": True})
    assert asked == ([] if device == "cpu" else [True, False, False])
    assert "batches" in inspect.signature(recorded.make_passes).parameters
