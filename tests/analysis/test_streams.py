"""Rules made side by side: in order, few at a time, and the same as one by one."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

import sculptor.analysis.derive
import sculptor.tasks.analyze
from sculptor import AnalyzeSettings, analyze
from sculptor.analysis.streams import MOST, in_streams, num_streams

CPU = torch.device("cpu")


def test_results_come_in_order_of_few_items_at_a_time() -> None:
    asked: list[int] = []
    both = threading.Barrier(2, timeout=60)

    def items() -> Iterator[int]:
        for i in range(8):
            asked.append(i)
            yield i

    def make(i: int) -> int:
        both.wait()  # ends with an error unless two are under way
        return 10 * i

    made = in_streams(make, items(), CPU, 2)
    assert next(made) == 0
    assert len(asked) == 3, "two under way, and one that waits"
    assert [*made] == [10 * i for i in range(1, 8)]


@pytest.mark.parametrize("count", [1, 3])
def test_an_error_ends_it(count: int) -> None:
    def make(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    made = in_streams(make, range(9), CPU, count)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(made)
    assert not [*made], "nothing goes on behind it"


def test_a_cpu_makes_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_streams(CPU, 1) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 20_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_000)
    gpu = torch.device("cuda")  # 12,000 bytes of room, of which nine tenths
    assert [num_streams(gpu, needed) for needed in (10**6, 10_000, 5_000, 3_000, 10)] == [1, 1, 2, 3, MOST]
    assert num_streams(gpu, 3_000, limit=8_000) == 2


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_the_archive_is_the_same_bit_for_bit(
    basis: Any, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(6))
    data = {} if basis == "weights" else {"data": (str(rows),)}
    settings = AnalyzeSettings(basis=basis, device=device, **data)
    for count in (1, 3):
        for module in (sculptor.tasks.analyze, sculptor.analysis.derive):
            monkeypatch.setattr(module, "num_streams", lambda *_, count=count: count)
        analyze(model, tmp_path / str(count), settings)
    one, three = ({path.name: path.read_bytes() for path in (tmp_path / str(n)).iterdir()} for n in (1, 3))
    assert one.keys() == three.keys()
    assert all(one[name] == three[name] for name in one if name.endswith(".safetensors"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_first_decompositions_of_a_process_may_be_side_by_side(tmp_path: Path) -> None:
    """Loading torch's library for them, which the first one does, is an error when two threads do it."""
    model = save_checkpoint(tmp_path / "model")
    run = "import sys; from sculptor_cli.main import run; run()"
    command = [sys.executable, "-c", run, "analyze", str(model), "-o", str(tmp_path / "a"), "--basis", "weights"]
    subprocess.run([*command, "--device", "cuda"], check=True)
