"""docs/trainers.md: every example runs, and what it leaves verifies."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows

import sculptor

PAGE = Path(__file__).resolve().parents[1] / "docs" / "trainers.md"


def example(title: str) -> str:
    """The code below a heading."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    found = re.search(r"^```python\n(.*?)^```", rest, re.M | re.S)
    assert found is not None, title
    return found[1]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, an archive of its weights and one with moments."""
    path = tmp_path_factory.mktemp("bases")
    save_checkpoint(path / "model")
    write_rows(path / "task.jsonl", task_rows())
    for name, options in {"weights": {"preserve": 0.5}, "moments": {"data": (str(path / "task.jsonl"),)}}.items():
        sculptor.analyze(path / "model", path / name, sculptor.AnalyzeSettings(device="cpu", **options))
    return {name: path / name for name in ("model", "task.jsonl", "weights", "moments")}


@pytest.fixture
def place(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(bases["model"])
    (tmp_path / "subspaces").symlink_to(bases["moments"])
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def run(*titles: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    for title in titles:
        exec(compile(example(title), str(PAGE), "exec"), namespace)
    return namespace


IMPORTS = "from datasets import Dataset\nfrom transformers import AutoModelForCausalLM\nimport sculptor, torch\n"
TITLES = {
    "Trainer": "by-trainer",
    "SFTTrainer": "by-sft",
    "DPOTrainer": "by-dpo",
    "GRPOTrainer": "by-grpo",
    "A plain PyTorch loop": "by-loop",
    "accelerate": "by-accelerate",
    "torch.compile": "by-compile",
}


@pytest.mark.parametrize("title", [pytest.param(each, marks=pytest.mark.slow if "TRL" in each else ()) for each in TITLES])
def test_examples_run_and_verify(place: Path, title: str) -> None:
    pytest.importorskip("datasets")
    if title.endswith("OTrainer") or title == "SFTTrainer":
        pytest.importorskip("trl")
    namespace: dict[str, Any] = {}
    exec(IMPORTS + example(title), namespace)
    found = sculptor.verify("model", TITLES[title], "subspaces", device="cpu")
    assert found.passed
    assert found.num_changed
    if "trainer" in namespace:
        assert namespace["trainer"].state.log_history[-1]["sculptor_leak"] == found.leak
        again = sculptor.Archive(place / TITLES[title] / "subspaces")
        again.check_base(sculptor.checkpoint.reader.open_checkpoint(place / TITLES[title]))
    if title == "DPOTrainer":
        log = namespace["trainer"].state.log_history
        assert any(abs(entry.get("loss", 0) - 0.6931) < 0.2 for entry in log) or "train_loss" in log[-2]
