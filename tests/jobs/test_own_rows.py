"""`train --replay self`: rows that are drawn for it, each for one place; kept for a run that is taken up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.errors import DataError, SettingsError, Stopped
from sculptor.jobs import own_rows
from sculptor.jobs.own_rows import OWN_ROWS

SETTINGS = TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, offload="none", device="cpu", save_every=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own-rows")
    save_checkpoint(root / "model")
    write_rows(root / "rows.jsonl", task_rows(count=12))
    analyze(root / "model", root / "archive", AnalyzeSettings(basis="curvature", calibration_tokens=300, device="cpu"))
    return root


def run(place: Path, output: Path, settings: TrainSettings = SETTINGS, **options: Any) -> Any:
    return train(
        place / "model", place / "archive", place / "rows.jsonl", output, settings, replay=["self:0.25"], **options
    )


def test_every_place_has_a_row_of_its_own(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    packed = own_rows._packed
    monkeypatch.setattr(own_rows, "_packed", lambda rows, asked: kept.extend(rows) or packed(rows, asked))
    told: list[str] = []
    report = run(place, tmp_path / "out", notice=told.append)
    assert report.num_examples == 12, "what is mixed in is no part of the task"
    assert len(kept) == 8, "a quarter of 8 steps of 4 rows"
    assert len({row.input_ids for row in kept}) == 8
    assert "--replay self: 8 rows that the model says are drawn first" in told
    assert "4 from self (others in each)" in next(line for line in told if "mixes in" in line)
    assert not list((tmp_path / "out").glob(OWN_ROWS)), "they are the run's, not the output's"


def test_a_run_that_is_taken_up_has_the_same(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place, tmp_path / "whole")
    polls = iter([None, None, 15])
    with pytest.raises(Stopped):
        run(place, tmp_path / "out", stop=lambda: next(polls))
    monkeypatch.setattr(own_rows, "_draw", None)
    run(place, tmp_path / "out", resume=True)
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(whole[name].equal(out[name]) for name in whole)


def test_streamed_and_resident_draw_the_same(place: Path, tmp_path: Path) -> None:
    for offload in ("none", "cpu"):
        run(place, tmp_path / offload, replace(SETTINGS, max_steps=2, offload=offload))
    none, cpu = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "cpu"))
    for name, value in none.items():
        assert value.allclose(cpu[name], atol=1e-5), name


def test_it_goes_with_a_limit_and_with_an_archive_without_samples(place: Path, tmp_path: Path) -> None:
    """What steers a limit is not what is trained on."""
    report = run(place, tmp_path / "limited", replace(SETTINGS, max_steps=3, max_harm=1e-4))
    assert report.loop.steering_harm <= 1e-4
    analyze(place / "model", tmp_path / "plain", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(
        place / "model",
        tmp_path / "plain",
        place / "rows.jsonl",
        tmp_path / "out",
        replace(SETTINGS, max_steps=1),
        replay=["self"],
    )


def test_a_file_of_something_else_is_not_taken(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polls = iter([None, 15])
    with pytest.raises(Stopped):
        run(place, tmp_path / "out", stop=lambda: next(polls))
    found = tmp_path / "out.partial" / OWN_ROWS
    before = found.read_bytes()
    for spoiled in (b"", before[:-3], before.replace(b'seed\\": 0', b'seed\\": 1')):
        assert spoiled != before
        found.write_bytes(spoiled)
        assert own_rows._read(found, {"rows": 8}) is None
    run(place, tmp_path / "out", resume=True)  # which draws them again, the same


def test_a_model_that_says_nothing_is_told(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sculptor.model.sampling.continue_prompts", lambda loaded, prompts, *_, **__: [[] for _ in prompts]
    )
    with pytest.raises(DataError, match=r"--replay self: .*says nothing by itself"):
        run(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_others_say_nothing(tmp_path: Path, family: str) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text" if family == "bert" else "pairs", 4))
    with pytest.raises(SettingsError, match="--replay self: only a causal model says something by itself"):
        train(model, tmp_path / "archive", rows, tmp_path / "out", SETTINGS, replay=["self"])
