"""How long a training is said to take, and when it is said at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.jobs import defaults
from sculptor.jobs import on_this_machine as module
from sculptor.methods.rule import cost_of
from sculptor.planning.expected import Expected, expect
from sculptor.planning.footprints import Workload
from sculptor.planning.matrices import planned_matrices

COVERS = ["sculptor.planning.expected"]
SPEEDS = {"tflops": 2e-6, "float32": 1e-6, "eigen": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("expected") / "model")


def test_each_stage_takes_its_operations(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    architecture = inspect_architecture(checkpoint)
    matrices = planned_matrices(architecture.targets, AnalyzeSettings())
    work = Workload(64, 2, recompute=False, row=16, micro_rows=2)
    whole = expect(checkpoint, architecture, matrices, work, 10, SPEEDS, analyzed=1000, remembered=300)
    numbers = sum(torch.Size(info.shape).numel() for info in checkpoint.infos.values())
    sides = {(t.input_group, t.shape[1]) for t in architecture.targets}
    squares = sum(d * d for _, d in sides) + sum(t.shape[0] ** 2 for t in architecture.targets)
    read = (8 * numbers + 2 * squares) / 1e6
    measured = {(f"{m.target.input_group}", m.target.shape[1]) for m in matrices} | {
        (m.target.name, m.target.shape[0]) for m in matrices
    }
    decomposed = sum(0.5 * (d / 512) ** 3 for _, d in measured)
    assert whole.archive == pytest.approx(300 * read + decomposed)
    assert whole.analysis == pytest.approx(1000 * (read + 12 * 2 * numbers / 1e6) + decomposed)
    inside = sum(t.shape[0] * t.shape[1] for t in architecture.targets)
    plain = 6 * (inside + architecture.vocab_size * checkpoint.config["hidden_size"]) * 64
    folds = sum(cost_of(m.rule, m.names).operations for m in matrices)
    assert 30 * (plain + folds) / 2e6 < whole.training < 30 * (1.2 * plain + 4 * folds) / 2e6
    assert whole.total == whole.analysis + whole.training + whole.archive
    alone = expect(checkpoint, architecture, matrices, work, 5, SPEEDS)
    assert (alone.analysis, alone.archive) == (0, 0)
    assert alone.training == pytest.approx(whole.training / 2)


def test_it_is_a_line() -> None:
    text = str(Expected(analysis=190, training=250, archive=20, steps=1060))
    assert text == "about 7 min in all: 3 to analyze, 4 for 1,060 steps"
    assert str(Expected(155, 230, 100, 9)) == "about 9 min in all: 3 to analyze, 4 for 9 steps, 2 for the next archive"
    assert str(Expected(0, 80, 0, 60)) == "about 1.3 min in all: 1.3 for 60 steps"


@pytest.mark.parametrize("given", [True, False])
def test_a_long_training_is_told_of_before_it_begins(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(count=10))
    archive = tmp_path / "archive" if given else None
    if given:
        analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = TrainSettings(max_steps=2, batch_size=4, device="cpu")
    measured: list[torch.dtype] = []

    def measure(
        asked: object, device: object, here: bool, place: Path, dtype: torch.dtype
    ) -> tuple[dict[str, float], tuple[str, ...]]:
        measured.append(dtype)
        return SPEEDS | {"tflops": 1e-8}, ()

    monkeypatch.setattr(module, "measure_speeds", measure)

    def told(name: str, **options: object) -> list[str]:
        lines: list[str] = []
        train(model, archive, [rows], tmp_path / name, settings, notice=lines.append, **options)  # type: ignore[arg-type]
        return [line for line in lines if line.startswith("about ")]

    assert told("quick") == []
    assert measured == [], "what is quick on any machine is not worth measuring this one"
    monkeypatch.setattr(module, "_SHORT", 0)
    (line,) = told("slow")
    assert measured == [torch.float32] * (1 if given else 2), "the analysis says for itself what it takes"
    assert "for 2 steps" in line
    assert ("to analyze" in line) is not given
    monkeypatch.setattr(module, "_WORTH", 10**9)
    assert told("still") == []


@pytest.mark.parametrize("data", [(), ("rows",)])
def test_a_long_analysis_is_told_of_before_it_begins(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[str, ...]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(count=10))
    settings = AnalyzeSettings(data=tuple(str(rows) for _ in data), device="cpu", samples=False)
    monkeypatch.setattr(defaults, "_CPU_TOKENS", (400, 400))
    monkeypatch.setattr(module, "measure_speeds", lambda *_: (SPEEDS | {"float32": 1e-7, "eigen": 0.001}, ()))

    def told(name: str) -> str:
        lines: list[str] = []
        analyze(model, tmp_path / name, settings, notice=lines.append)
        return next(line for line in lines if line.startswith("it takes 400 tokens"))

    assert "min" not in told("quick")
    monkeypatch.setattr(module, "_SHORT", 0)
    numbers = sum(torch.Size(info.shape).numel() for info in open_checkpoint(model).infos.values())
    sides = {t.input_group: t.shape[1] for t in inspect_architecture(open_checkpoint(model)).targets}.values()
    sides = [*sides, *(t.shape[0] for t in inspect_architecture(open_checkpoint(model)).targets)]
    sampled = 0 if data else 12 * 2 * numbers
    seconds = 400 * (8 * numbers + 2 * sum(d * d for d in sides) + sampled) / 1e5
    seconds += sum(0.001 * (d / 512) ** 3 for d in sides)
    assert f": about {seconds / 60:.0f} min, on this machine with nothing else to do; fewer" in told("slow")
    monkeypatch.setattr(module, "_WORTH", 10**9)
    assert "min" not in told("still")


def test_an_estimate_says_it_on_a_cpu_with_data(model: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(count=10))
    told = ("--tflops", 1e-5, "--disk", 1, "--device", "cpu")
    found = cli("estimate", model, "--data", rows, *told)
    assert "min in all: " in found.out
    assert "by `sculptor train` with nothing else said." in found.out
    assert "device: bases" not in found.out
    assert "device: bases" in cli("estimate", model, "--data", rows, *told, "--all").out
    assert "in all: " not in cli("estimate", model, *told).out
    as_json = cli("estimate", model, "--data", rows, *told, "--json").json
    assert as_json["expected"]["steps"] == as_json["total"]
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    given = cli("estimate", model, "--data", rows, "--subspaces", tmp_path / "archive", *told, "--json").json[
        "expected"
    ]
    assert (given["analysis"], given["archive"]) == (0, 0)
