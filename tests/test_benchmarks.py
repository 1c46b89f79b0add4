"""Benchmarks run on a CPU, too, so that what they call does not go away unnoticed until a GPU is there."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import save_checkpoint, task_rows, write_rows

import sculptor
from sculptor.benchmark.contenders import analysis_of
from sculptor.benchmark.plan import AdapterSettings, EvaluateSettings, Plan
from sculptor.training.rates import default_relative_rate

PLACE = Path(__file__).parent / "benchmarks"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """A benchmark as its command runs it, in this process."""
    monkeypatch.setattr(sys, "argv", [str(PLACE / name), *map(str, arguments)])
    monkeypatch.syspath_prepend(str(PLACE))
    runpy.run_path(str(PLACE / name), run_name="__main__")


def test_offload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = ["full:2:1", "resident:2:1", "cpu:2", "cpu:2:fused", "disk:2"]
    options = ["--length", 16, "--steps", 1, "--device", "cpu", "--scratch", tmp_path / "scratch"]
    monkeypatch.setattr("torch.randint", _of_the_vocabulary)
    run(monkeypatch, "offload.py", model, *rows, *options)
    _, *found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["row"] for row in found] == rows
    first = [row["losses"][0] for row in found]
    assert first == pytest.approx([first[0]] * 5, abs=1e-3), "one model, one batch"


def _of_the_vocabulary(low: int, high: int, *more: object, **named: object) -> object:
    import torch

    return torch.Tensor.random_(torch.empty(*more, dtype=torch.long), low, 40, generator=named["generator"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = save_checkpoint(tmp_path / "model"), tmp_path / "data" / "task"
    data.mkdir(parents=True)
    for name in ("train", "validation"):
        write_rows(data / f"{name}.jsonl", task_rows())
    text = write_rows(tmp_path / "text.jsonl", task_rows("text", 6))
    run(
        monkeypatch, "harm.py", model, "--data", data.parent, "--output", tmp_path / "out", "--tasks", "task", "--limits", 0.01,
        "--free", 1, 2, "--watch", text, "--rows", 24, "--batch-size", 8, "--epochs", 1, "--max-length", 48,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "1 runs with a limit" in said
    assert "3 runs" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {row["limit"] for row in rows} == {0.01, None}
    assert all(row["fresh"] > 0 for row in rows)


@pytest.mark.slow
def test_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint(tmp_path / "model")
    sculptor.analyze(model, tmp_path / "archive", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    monkeypatch.setattr("torch.randint", _of_the_vocabulary)
    run(
        monkeypatch, "step.py", model, "--archive", f"weights={tmp_path / 'archive'}", "--rows", 2, "--micro", 1, "--length", 16,
        "--steps", 1, "--methods", "plain", "protect weights", "train weights", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 3
    assert "protect weights" in capsys.readouterr().out


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = save_checkpoint(tmp_path / "model")
    run(
        monkeypatch, "scaling.py", "--tokenizer", tokenizer, "--word", "w1 ", "--axes", "depth", "--scale", 0.125, "--length", 16,
        "--calibration", 64, "--vocabulary", 64, "--steps", 1, "--json", tmp_path / "found.json",
    )  # fmt: skip
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert [row["depth"] for row in found["rows"]] == [2, 4, 8]
    assert all(row[stage] > 0 for row in found["rows"] for stage in found["exponents"])
    assert "exponent" in capsys.readouterr().out


def _load(monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, object]:
    monkeypatch.syspath_prepend(str(PLACE))
    return runpy.run_path(str(PLACE / name))


def test_neighbours_are_run_at_the_best_of_three_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _load(monkeypatch, "neighbours.py")
    follow, trials, neighbours = found["follow"], found["trials"], found["NEIGHBOURS"]
    done = {}
    for i, method in enumerate(neighbours):
        for k, run in enumerate(trials(method)):
            assert not [one for one in follow(done) if one.method == method], "not all of its rates have been tried"
            done[run] = None if k == 0 and i == 2 else {"metrics": {"average": 0.1 * k + 0.01 * i}}
    asked = follow(done)
    assert {run.rate for run in asked} == {trials("lines")[2].rate}
    assert [(run.order, run.method) for run in asked if run.seed == 0] == [(o, m) for m in neighbours for o in "12"]
    assert {run.method for run in asked if run.seed} == set(neighbours[-2:]), "the best two"
    assert {run.split for run in asked} == {"test"}


def test_rates_of_neighbours_are_about_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark takes for a default is what an analysis says."""
    found = _load(monkeypatch, "neighbours.py")
    model = save_checkpoint(tmp_path / "model")
    plan = Plan(
        model=str(model), tasks=(), watch=(), analyze=sculptor.AnalyzeSettings(device="cpu"),
        train=sculptor.TrainSettings(), evaluate=EvaluateSettings(), adapter=AdapterSettings(),
    )  # fmt: skip
    for method in ("full", "sara", "orthsr"):
        sculptor.analyze(model, tmp_path / method, analysis_of(plan, method))
        name, rate = found["default_rate"](method, model)
        assert name == "relative_rate"
        assert rate == pytest.approx(default_relative_rate(sculptor.Archive(tmp_path / method)), rel=0.05), method


def test_a_suite_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs whose results are there are not run again, nor what follows from them."""
    found = _load(monkeypatch, "continual.py")
    run_of, started = found["Run"], list[str]()
    first, second, third = (run_of("1", "full", rate) for rate in (1.0, 2.0, 3.0))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps({"run": run.name}) + "\n" for run in (first, second)))

    class Done:
        def poll(self) -> int:
            return 0

    def start(run: Any, *_: object) -> Done:
        started.append(run.name)
        return Done()

    scope = found["run_suites"].__globals__
    monkeypatch.setitem(scope, "start", start)
    monkeypatch.setitem(scope, "report", lambda *_: {})
    monkeypatch.setattr(sys, "argv", ["x", "all", *(f"--{name}={tmp_path}" for name in ("model", "data", "output"))])
    follow = {1: [second], 2: [second, third], 3: [second, third]}
    found["run_suites"]({"all": [first]}, lambda *_: "", "", follow=lambda done: follow[len(done)])
    assert started == [third.name]
    assert "0 runs not started" in capsys.readouterr().out
