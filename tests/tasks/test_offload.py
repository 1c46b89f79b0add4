"""Analysis and evaluation of a model that is streamed: the same archive, the same figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, slowly, task_rows, write_rows

import sculptor
from sculptor.streaming.regions import HostRegion


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("family", "basis"),
    [("gpt2", "inputs"), ("mixtral", "curvature"), *slowly(("llama", "curvature"), ("t5", "curvature"))],
)
def test_a_streamed_analysis_gives_the_same_archive(
    cli: Callable[..., Result], family: str, basis: str, offload: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "model", family)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    for name in ("none", offload):
        found = cli(
            "analyze", tmp_path / "model", "--basis", basis, "--data", rows, "-o", tmp_path / name, "--offload", name,
            "--budget", 0.7, "--device", "cpu",
        )  # fmt: skip
        assert found.code == 0, found.err
    whole, streamed = sculptor.Archive(tmp_path / "none"), sculptor.Archive(tmp_path / offload)
    assert whole.manifest.matrices.keys() == streamed.manifest.matrices.keys()
    for name in whole.manifest.tensors:
        torch.testing.assert_close(streamed.tensor(name), whole.tensor(name), atol=1e-6, rtol=0)
    assert list(streamed.manifest.matrices.values()) == list(whole.manifest.matrices.values())


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_text_is_sampled_from_a_streamed_model(offload: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    settings = sculptor.AnalyzeSettings(
        basis="inputs", data=("self",), calibration_tokens=400, max_length=16, device="cpu"
    )
    found = [
        sculptor.analyze(tmp_path / "model", tmp_path / name, settings, offload=name) for name in ("none", offload)
    ]  # type: ignore[arg-type]
    assert found[0].calibration == found[1].calibration


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_streamed_evaluation_gives_the_same_figures(cli: Callable[..., Result], family: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", family)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text" if family == "bert" else "pairs"))
    found = [
        cli("evaluate", tmp_path / "model", "--data", rows, "--device", "cpu", "--offload", name, "--json").json
        for name in ("none", "cpu", "disk")
    ]
    assert found[0] == found[1] == found[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "rows.jsonl"]


@pytest.mark.parametrize("task", ["analyze", "evaluate", "train"])
def test_host_memory_is_given_back(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = str(write_rows(tmp_path / "rows.jsonl", task_rows()))
    settings = sculptor.AnalyzeSettings(basis="curvature", data=(rows,), device="cpu", budget=0.7)
    sculptor.analyze(model, tmp_path / "archive", settings, offload="none")
    held: list[HostRegion] = []
    begin, close = HostRegion.__init__, HostRegion.close

    def opened(region: HostRegion, *rest: Any) -> None:
        begin(region, *rest)
        held.append(region)

    def closed(region: HostRegion) -> None:
        close(region)
        held.remove(region)

    monkeypatch.setattr(HostRegion, "__init__", opened)
    monkeypatch.setattr(HostRegion, "close", closed)
    if task == "analyze":
        sculptor.analyze(model, tmp_path / "out", settings, offload="cpu")
    elif task == "evaluate":
        sculptor.evaluate(model, [rows], device="cpu", offload="cpu")
    else:
        chosen = sculptor.TrainSettings(max_steps=2, offload="cpu", device="cpu", memory_rows=8)
        sculptor.train(model, tmp_path / "archive", [rows], tmp_path / "out", chosen)
    assert not held
