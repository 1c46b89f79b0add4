"""SIGKILL and SIGTERM in the middle of real processes. tests/benchmarks/kill.py does it twenty times each."""

import signal
import subprocess
from pathlib import Path

import pytest
from benchmarks.kill import COMMAND, same_files, wait_for
from conftest import save_checkpoint, task_rows, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kill")
    made = {"root": root, "model": save_checkpoint(root / "model"), "data": write_rows(root / "t.jsonl", task_rows())}
    subprocess.run([*COMMAND, "analyze", made["model"], "-o", root / "archive", "--preserve", "0.5"], check=True)
    return made | {"archive": root / "archive"}


def train_command(inputs: dict[str, Path], output: Path, steps: int) -> list[str]:
    arguments = ["--max-steps", steps, "--save-every", 5, "--batch-size", 4, "--device", "cpu", "-o", output]
    return [*COMMAND, "train", *map(str, [inputs["model"], "--subspaces", inputs["archive"], "--data", inputs["data"]]),
            *map(str, arguments)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "optimizer"), [("none", "adamw"), ("disk", "adamw"), ("none", "bayes-adam")])
def test_a_killed_training_goes_on_bit_for_bit(inputs: dict[str, Path], offload: str, optimizer: str) -> None:
    whole, cut = (inputs["root"] / f"{name}-{offload}-{optimizer}" for name in ("whole", "cut"))
    told = ["--offload", offload, "--optimizer", optimizer]
    commands = {output: [*train_command(inputs, output, 200), *told] for output in (whole, cut)}
    subprocess.run(commands[whole], check=True, capture_output=True)
    process = subprocess.Popen(commands[cut], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any((cut.parent / f"{cut.name}.partial" / "state").glob("step-0000002?")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not cut.exists()
    refused = subprocess.run(commands[cut], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "--resume" in refused.stderr
    assert "--overwrite" in refused.stderr
    subprocess.run([*commands[cut], "--resume"], check=True, capture_output=True)
    assert same_files(whole, cut)
    assert not (cut.parent / f"{cut.name}.partial").exists()


def test_sigterm_saves_and_exits(inputs: dict[str, Path]) -> None:
    output = inputs["root"] / "terminated"
    process = subprocess.Popen(train_command(inputs, output, 100000), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any((output.parent / "terminated.partial" / "state").glob("step-*")), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143
    assert "the state is saved, go on with --resume" in err
    assert "Traceback" not in err
    assert any((output.parent / "terminated.partial" / "state").glob("step-????????"))


@pytest.mark.slow
def test_a_killed_analysis_leaves_nothing_that_looks_finished(inputs: dict[str, Path]) -> None:
    output = inputs["root"] / "killed-archive"
    command = [*COMMAND, "analyze", str(inputs["model"]), "-o", str(output), "--preserve", "0.5"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (output.parent / "killed-archive.partial").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (output.parent / "killed-archive.partial" / "progress.json").exists():
        assert subprocess.run(command, capture_output=True).returncode == 1
        subprocess.run([*command, "--resume"], check=True, capture_output=True)
    elif not output.exists():  # nothing that is worth keeping; or it was quicker
        subprocess.run(command, check=True, capture_output=True)
    assert same_files(inputs["archive"], output)
