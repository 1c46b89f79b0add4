"""What several processes measure is what one measures, figure by figure; a sequence of tasks runs in them, too."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save_checkpoint, slowly, task_rows, write_rows
from plans import two_tasks
from together import Failed, continue_until, together

import sculptor
from sculptor.evaluation.rows import Evaluation

COVERS = ["sculptor.evaluation.rows", "sculptor.tasks.evaluate", "sculptor.jobs.evaluate_request"]
CPU = {"device": "cpu"}
TALK = [
    {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 2}"}]}
    for i in range(5)
]
CHOICES = [{"prompt": f"w{i} w2", "choices": ["w2", "w3 w4", "w5"], "gold": i % 3} for i in range(5)]
TEMPLATE = "{% for m in messages %}{{ m.content }} <end> {% endfor %}"

# What is carried on from dW has directions of rounding in it, and AdamW steps along each as far as along others.
PLAN = two_tasks(
    watch=["general.jsonl"],
    analyze={"preserve": 0.5},
    train={"max_steps": 3, "batch_size": 8, "learning_rate": 1e-2, "save_every": 1, "carry": "keep"},
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("together")
    save_checkpoint(path / "base")
    write_rows(path / "pairs.jsonl", task_rows(count=7))
    write_rows(path / "general.jsonl", task_rows("text", 5))
    write_rows(path / "talk.jsonl", TALK)
    write_rows(path / "choices.jsonl", CHOICES)
    (path / "template.jinja").write_text(TEMPLATE)
    for i, name in enumerate(("first", "second")):
        write_rows(path / f"{name}.jsonl", task_rows(count=24)[12 * i : 12 * i + 12])
    (path / "plan.toml").write_text(PLAN)
    return path


def rounded(found: Evaluation) -> dict[str, Any]:
    """Every figure, but for rounding."""
    return {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for name, value in asdict(replace(found, watched=())).items()
    }


@pytest.mark.parametrize(
    ("data", "options", "size"),
    [
        *slowly(("pairs", {"show": 2}, 2)),
        ("choices", {"exact_match": True}, 3),
        ("talk", {"exact_match": True, "show": 1, "max_new_tokens": 3, "chat_template": "template.jinja"}, 2),
        ("general", {}, 2),
        *slowly(("pairs", {"labels": [f"w{i}" for i in range(40)], "batch_size": 1}, 2), ("talk", {}, 7)),
    ],
)
def test_every_figure_is_that_of_one_process(place: Path, data: str, options: dict[str, Any], size: int) -> None:
    if data == "talk":
        options = options | {"chat_template": str(place / "template.jinja")}
    given = (place / "base", [place / f"{data}.jsonl"])
    options = options | CPU | ({} if data == "talk" else {"watch": [place / "general.jsonl"]})
    expected = sculptor.evaluate(*given, **options)
    found = together(size, sculptor.evaluate, *given, **options)
    assert all(each == found[0] for each in found), "every process is told the same"
    assert asdict(replace(found[0], watched=())) == rounded(expected)
    for one, other in zip(expected.watched, found[0].watched, strict=True):
        assert (other.name, other.num_tokens) == (one.name, one.num_tokens)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)


def test_a_masked_model_is_measured_together(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", "bert")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text", 5))
    expected = sculptor.evaluate(tmp_path / "model", [rows], **CPU)
    found = together(2, sculptor.evaluate, tmp_path / "model", [rows], **CPU)
    assert asdict(found[1]) == rounded(expected) | {"watched": ()}


def test_what_is_wrong_is_told_once(place: Path) -> None:
    for call, given, options, line in (
        (sculptor.evaluate, (place / "base", [place / "nothing.jsonl"]), CPU, "nothing.jsonl"),
        (sculptor.evaluate, (place / "base",), {"tasks": ["arc_easy"], **CPU}, "lm-eval runs in one"),
        (sculptor.continual, (place / "plan.toml", place / "peft"), {"method": "lora"}, "PEFT's methods run in one"),
    ):
        with pytest.raises(Failed) as found:
            together(2, call, *given, **options)
        first = found.value.errors[0]
        assert first is not None
        assert line in first[1]
    assert not (place / "peft.partial").exists()


def assert_same_report(one: Path, other: Path) -> None:
    expected, found = (json.loads((path / "continual.json").read_text()) for path in (one, other))
    assert found["plan"] == expected["plan"]
    assert found["metric"] == expected["metric"]
    for before, after in zip(expected["stages"], found["stages"], strict=True):
        assert after["name"] == before["name"]
        assert after["archive_bytes"] == before["archive_bytes"]
        assert after["watch_loss"] == pytest.approx(before["watch_loss"], abs=1e-4)
        for task, score in before["scores"].items():
            assert after["scores"][task]["loss"] == pytest.approx(score["loss"], abs=1e-4)
    files = [sorted(str(file.relative_to(path)) for file in path.rglob("*")) for path in (one, other)]
    assert files[0] == files[1]
    assert sculptor.verify(other / "model", other / "model", other / "model" / "subspaces", **CPU).passed


@pytest.mark.slow
def test_a_sequence_is_that_of_one_process(place: Path, tmp_path: Path) -> None:
    expected = sculptor.continual(place / "plan.toml", tmp_path / "one")
    found = together(2, sculptor.continual, place / "plan.toml", tmp_path / "two")
    assert found[0] == found[1], "every process is told the same"
    assert found[0].matrix == tuple(tuple(pytest.approx(score, abs=0.1) for score in row) for row in expected.matrix)
    assert_same_report(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.slow
def test_a_sequence_goes_on_with_other_processes(place: Path, tmp_path: Path) -> None:
    sculptor.continual(place / "plan.toml", tmp_path / "whole")
    with pytest.raises(Failed, match="the state is saved"):
        together(2, continue_until, 5, place / "plan.toml", tmp_path / "cut")
    assert (tmp_path / "cut.partial" / "scores.json").is_file()
    together(3, sculptor.continual, place / "plan.toml", tmp_path / "cut", resume=True)
    assert_same_report(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "joint", "inflora"])
def test_other_methods_run_together(place: Path, tmp_path: Path, method: Any) -> None:
    found = together(2, sculptor.continual, place / "plan.toml", tmp_path / "two", method=method)
    expected = sculptor.continual(place / "plan.toml", tmp_path / "one", method=method)
    for before, after in zip(expected.stages, found[0].stages, strict=True):
        assert after.watch_loss == pytest.approx(before.watch_loss, abs=1e-3)
