"""A signal that ends a command leaves nothing behind but what `--resume` takes up, and one line."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.analysis import calibration
from sculptor.archive.shards import ShardWriter
from sculptor.checkpoint import staging
from sculptor.jobs import defaults
from sculptor.training.loop import TrainingLoop

COVERS = ["sculptor.interruption"]
COMMANDS: dict[str, tuple[str, ...]] = {
    "edit": ("edit", "interpolate", "{model}", "{tuned}", "--alpha", "0.5", "--device", "cpu"),
    "prune": ("edit", "prune", "{model}", "--sparsity", "0.3", "--by", "magnitude"),
    "convert": ("convert", "{archive}", "--model", "{model}"),
    "analyze": ("analyze", "{model}", "--preserve", "0.5", "--device", "cpu"),
    "train": ("train", "{model}", "--data", "{rows}", "--device", "cpu", "--max-steps", "3"),
}


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """A shell has what it runs in the background ignore Ctrl-C, and so do the commands then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("interrupted")
    save_checkpoint(path / "model")
    save_checkpoint(path / "tuned", seed=1)
    analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    write_rows(path / "rows", task_rows())
    return {name: str(path / name) for name in ("model", "tuned", "archive", "rows")}


def comes(then: Callable[..., Any], number: int) -> Callable[..., Any]:
    """What happens, and a signal behind it; a second one would end this process."""
    times = [0]

    def called(*given: Any, **named: Any) -> Any:
        found = then(*given, **named)
        times[0] += 1
        if times[0] == 1:
            os.kill(os.getpid(), number)
        return found

    return called


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_left_of_what_has_only_begun(
    cli: Callable[..., Result], made: dict[str, str], name: str, number: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    begin = staging.begin

    def begun(partial: Path, command: str) -> None:
        begin(partial, command)
        if name != "train" or partial.name == "analyzed.partial":  # of a training, in the midst of its own analysis
            os.kill(os.getpid(), number)

    monkeypatch.setattr(staging, "begin", begun)
    found = cli(*(part.format(**made) for part in COMMANDS[name]), "-o", tmp_path / "out")
    assert found.code == 128 + number
    assert found.err == (
        f"error: stopped by {signal.Signals(number).name}"
        + (
            "; nothing was done yet that --resume could go on with, start it again\n"
            if name in ("analyze", "train")
            else "\n"
        )
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "within"), [("analyze", ""), pytest.param("train", "analyzed", marks=pytest.mark.slow)]
)
def test_what_is_done_is_kept_and_taken_up(
    cli: Callable[..., Result], made: dict[str, str], name: str, within: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(defaults, "_CPU_TOKENS", (400, 400))
    command = [part.format(**made) for part in COMMANDS[name]]
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", comes(ShardWriter.add, signal.SIGINT))
        patch.setattr(
            ShardWriter, "_take", lambda self, record: (take(self, record), self.flush(), self._last.result())
        )
        found = cli(*command, "-o", tmp_path / "out")
    assert found.code == 130
    partial = tmp_path / "out.partial"
    assert f"stopped by SIGINT; what is done is in {partial}, go on with --resume" in found.err
    assert "left over from a run" in cli(*command, "-o", tmp_path / "out").err
    assert cli(*command, "-o", tmp_path / "out", "--resume").code == 0
    assert not partial.exists()
    assert cli(*command, "-o", tmp_path / "whole").code == 0
    one, other = (Archive(tmp_path / place / within) for place in ("whole", "out"))
    assert {name: found.sha256 for name, found in one.manifest.tensors.items()} == {
        name: found.sha256 for name, found in other.manifest.tensors.items()
    }


take = ShardWriter._take


def test_an_exchange_of_outputs_is_not_cut_in_two(
    cli: Callable[..., Result], made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [part.format(**made) for part in COMMANDS["edit"]]
    assert cli(*command, "-o", tmp_path / "out").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", comes(Path.rename, signal.SIGTERM))
        found = cli(*command, "--alpha", "0.6", "-o", tmp_path / "out", "--overwrite")
    assert found.code == 143
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_signal_in_the_last_step_and_while_rows_are_measured(
    cli: Callable[..., Result], made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stops the run at the next safe place, and the end is that of a run that nothing stopped."""
    analyze(made["model"], tmp_path / "a", AnalyzeSettings(basis="inputs", data=(made["rows"],), device="cpu"))
    steps = ("--subspaces", str(tmp_path / "a"), "--batch-size", "4", "--save-every", "9")
    command = [*(part.format(**made) for part in COMMANDS["train"]), *steps]
    step = TrainingLoop._step

    def last(loop: TrainingLoop, number: int, *given: Any) -> None:
        step(loop, number, *given)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    partial = tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", last)
        found = cli(*command, "-o", tmp_path / "out")
    assert found.code == 143
    assert "stopped by signal 15 after step 3 of 3; the state is saved, go on with --resume" in found.err
    assert not (partial / "output").exists(), "nothing was written after the signal"
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "find_masks", comes(calibration.find_masks, signal.SIGTERM))
        found = cli(*command, "-o", tmp_path / "out", "--resume")
    assert found.code == 143
    assert f"stopped by SIGTERM; what is done is in {partial}, go on with --resume" in found.err
    assert cli(*command, "-o", tmp_path / "out", "--resume").code == 0
    assert cli(*command, "-o", tmp_path / "whole").code == 0
    for name in ("model.safetensors", "subspaces/subspaces-00001.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
