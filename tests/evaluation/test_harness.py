"""Tasks of lm-eval on files of one's own, without a network."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, save_checkpoint, write_rows
from evaluation.test_answers import CHOICES

TASK = """task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.slow
def test_a_task_of_ones_own_is_what_choices_are(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = save_checkpoint(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", CHOICES)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(TASK.format(data=data))
    tasks = ("--tasks", "mine", "--include-path", tmp_path / "tasks")
    found = cli("evaluate", model, "--data", data, *tasks, "--device", "cpu", "--json").json
    figures = {task["metric"]: task["value"] for task in found["tasks"]}
    assert figures == pytest.approx({"acc": found["accuracy"], "acc_norm": found["acc_norm"]})
    assert found["tasks"][0]["num_rows"] == len(CHOICES)
    wrong = cli("evaluate", model, "--tasks", "mine2", "--include-path", tmp_path / "tasks")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "nearest are mine" in wrong.err


def test_without_it_the_extra_is_named(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = save_checkpoint(tmp_path / "model")
    found = cli("evaluate", model, "--tasks", "mine")
    assert found.code == 2
    assert found.err.startswith("error: --tasks needs lm-eval: pip install 'sculptor-subspaces[harness]'")
    assert "without effect" in cli("evaluate", model, "--watch", model / "config.json", "--chat").err
