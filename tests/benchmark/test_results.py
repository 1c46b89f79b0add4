"""What `continual` says of a sequence, by hand; and scores.json wrong in every way."""

import json
from pathlib import Path
from typing import Any

import pytest
from mutations import mutations

from sculptor.benchmark.plan import AdapterSettings, EvaluateSettings, Plan, PlannedTask
from sculptor.benchmark.results import Scores, Stage, TaskScore, plain, report_of
from sculptor.errors import OutputError
from sculptor.methods.settings import AnalyzeSettings
from sculptor.training.settings import TrainSettings
from sculptor.validation import read_json

OUTPUT = Path("/somewhere/out")


def planned(*names: str) -> Plan:
    return Plan(
        model="base",
        tasks=tuple(PlannedTask(name=name, data="a", test="b") for name in names),
        watch=(),
        analyze=AnalyzeSettings(),
        train=TrainSettings(seed=7),
        evaluate=EvaluateSettings(),
        adapter=AdapterSettings(),
    )


def stage(name: str, watch: float | None = None, **scores: tuple[float | None, float | None, float]) -> Stage:
    return Stage(name, {task: TaskScore(*found) for task, found in scores.items()}, watch, None, 1.0)


STAGES = (
    stage("base", 2.0, a=(0.1, 0.0, 3.0), b=(0.2, 0.1, 4.0)),
    stage("a", 2.25, a=(0.9, 0.7, 0.5), b=(0.3, 0.1, 3.0)),
    stage("b", 2.5, a=(0.6, 0.5, 1.0), b=(0.8, 0.6, 0.25)),
)


def test_a_row_per_stage_and_a_column_per_task() -> None:
    found = report_of(planned("a", "b"), "sculptor", "curvature", "test", STAGES, OUTPUT)
    assert found.tasks == ("a", "b")
    assert found.metric == "accuracy"
    assert found.matrix == ((0.1, 0.2), (0.9, 0.3), (0.6, 0.8))
    assert found.metrics.average == pytest.approx(0.7)
    assert found.metrics.backward == pytest.approx(-0.3)
    assert found.metrics.learning == pytest.approx(0.85)
    assert found.metrics.forward == pytest.approx(0.1)
    assert found.watch_rise == pytest.approx(0.5)
    assert (found.split, found.seed, found.method) == ("test", 7, "sculptor")
    assert found.stages == STAGES


def test_columns_are_in_the_order_of_the_plan_whatever_that_of_the_scores() -> None:
    turned = [stage("x", b=(0.2, None, 1.0), a=(0.1, None, 1.0)) for _ in range(3)]
    found = report_of(planned("a", "b"), "sculptor", "weights", "test", turned, OUTPUT)
    assert found.matrix == ((0.1, 0.2),) * 3


def test_the_measure_is_the_first_that_every_task_has() -> None:
    """Losses are turned round: more is better."""
    no_labels = (*STAGES[:2], stage("b", a=(0.6, 0.5, 1.0), b=(None, 0.6, 0.25)))
    found = report_of(planned("a", "b"), "sculptor", "weights", "test", no_labels, OUTPUT)
    assert found.metric == "exact_match"
    assert found.matrix[-1] == (0.5, 0.6)
    neither = (*STAGES[:2], stage("b", a=(None, 0.5, 1.0), b=(0.8, None, 0.25)))
    found = report_of(planned("a", "b"), "sculptor", "weights", "test", neither, OUTPUT)
    assert found.metric == "loss"
    assert found.matrix == ((-3.0, -4.0), (-0.5, -3.0), (-1.0, -0.25))
    assert found.metrics.backward == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("method", "basis"),
    [("sculptor", "curvature"), ("random", "random"), ("full", None), ("joint", None), ("lora", None), ("osf", None)],
)
def test_only_what_has_an_archive_has_a_basis(method: Any, basis: str | None) -> None:
    assert report_of(planned("a", "b"), method, "curvature", "test", STAGES, OUTPUT).basis == basis


def test_without_watched_texts_nothing_rises() -> None:
    quiet = tuple(Stage(s.name, s.scores, None, None, 1.0) for s in STAGES)
    assert report_of(planned("a", "b"), "full", "weights", "test", quiet, OUTPUT).watch_rise is None


def test_learned_together_has_an_average_only() -> None:
    found = report_of(planned("a", "b"), "joint", "weights", "test", (STAGES[0], STAGES[2]), OUTPUT)
    assert (found.metrics.backward, found.metrics.learning, found.metrics.forward) == (None, None, None)
    assert found.metrics.average == pytest.approx(0.7)


def test_one_task_has_nothing_to_forget() -> None:
    one = (stage("base", a=(0.1, None, 1.0)), stage("a", a=(0.75, None, 0.5)))
    found = report_of(planned("a"), "sculptor", "weights", "test", one, OUTPUT)
    assert (found.metrics.average, found.metrics.learning) == (0.75, 0.75)
    assert (found.metrics.backward, found.metrics.forward) == (None, None)


def test_a_report_is_plain_json() -> None:
    found = report_of(planned("a", "b"), "sculptor", "curvature", "validation", STAGES, OUTPUT)
    again = json.loads(json.dumps(plain(found), allow_nan=False))
    assert again["output"] == str(OUTPUT)
    assert again["stages"][1]["scores"]["b"] == {"accuracy": 0.3, "exact_match": 0.1, "loss": 3.0}
    assert again["metrics"]["average"] == found.metrics.average


def test_every_field_of_the_scores_wrong_in_every_way_is_one_line() -> None:
    content = {
        "key": {"plan": {"a": 1}},
        "stages": [
            {
                "name": "base",
                "scores": {"a": {"accuracy": 0.5, "exact_match": None, "loss": 1.5}},
                "watch_loss": 2.0,
                "archive_bytes": 100,
                "seconds": 3.5,
                "peak_bytes": 7,
            }
        ],
    }
    count = refused = 0
    for what, changed, must_fail in mutations(Scores, content, {}):
        count += 1
        try:
            read_json(Scores, json.dumps(changed), "scores.json", OutputError, "pass --overwrite")
        except OutputError as error:
            refused += 1
            assert str(error).isprintable(), what
            assert len(str(error)) < 1500, what
        else:
            assert not must_fail, what
    assert count > 70
    assert refused > 60
