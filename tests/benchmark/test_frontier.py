"""Finished sequences side by side, by hand; damaged and foreign ones; the command with its page and picture."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result
from mutations import mutations

from sculptor.benchmark.finished import Finished, read_finished
from sculptor.benchmark.frontier import frontier
from sculptor.errors import DataError, SettingsError
from sculptor.model.harm import Harm
from sculptor.report import plot
from sculptor.report.frontier import frontier_text
from sculptor.report.html.frontier import frontier_page
from sculptor.validation import read_json

COVERS = ["sculptor.report.frontier", "sculptor.report.html.frontier"]


def finished(
    place: Path, method: str = "sculptor", average: float = 0.5, harm: float | None = 0.02, **more: Any
) -> Path:
    """The output of a run, as far as it is read."""
    place.mkdir(parents=True)
    seed, rate = more.pop("seed", 0), more.pop("rate", 1e-3)
    tasks = more.pop("tasks", ["a", "b"])
    score = {"accuracy": 0.5, "exact_match": None, "loss": 1.0}
    stages = [
        {"name": name, "scores": dict.fromkeys(tasks, score), "watch_loss": 2.0 + i, "archive_bytes": None,
         "seconds": 10.0 * i, "watched": {"wiki.txt": 2.0 + i}, "update": None, "harm": None}
        for i, name in enumerate(("base", *tasks))
    ]  # fmt: skip
    content = {
        "created_by": "sculptor", "method": method, "basis": "curvature" if method == "sculptor" else None, "split": "test",
        "seed": seed, "tasks": tasks, "metric": "accuracy", "stages": stages,
        "metrics": {"average": average, "backward": -0.01, "learning": average + 0.01, "forward": None}, "watch_rise": 2.0,
        "harm": None if harm is None else {
            "nats": harm, "error": harm / 10, "first": 5 * harm, "first_error": harm, "num_samples": 9, "num_tokens": 90
        },
        "plan": {"model": "m", "train": {"seed": seed, "learning_rate": rate}, "method": method},
    } | more  # fmt: skip
    (place / "continual.json").write_text(json.dumps(content))
    return place


def test_points_are_means_over_seeds_named_by_what_differs_and_in_order_of_harm(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / "1", average=0.70, harm=0.04),
        finished(tmp_path / "2", average=0.74, harm=0.06, seed=1),
        finished(tmp_path / "3", average=0.60, harm=0.01, rate=1e-4),
        finished(tmp_path / "4", "full", average=0.75, harm=0.5),
        finished(tmp_path / "5", "lora", average=0.65, harm=None, watch_rise=0.1),
    ]
    found = frontier(runs)
    assert [point.name for point in found.points] == [
        "sculptor (curvature), rate 0.0001",
        "sculptor (curvature), rate 0.001",
        "full",
        "lora",
    ]
    point = next(point for point in found.points if point.seeds == (0, 1))
    assert point.harm is not None
    assert point.harm.mean == pytest.approx(0.05)
    assert point.average.mean == pytest.approx(0.72)
    assert point.average.deviation == pytest.approx(math.sqrt(2) * 0.02)
    assert point.watched["wiki.txt"].mean == pytest.approx(2.0)
    assert point.seconds.mean == 30.0
    text = frontier_text(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "72.0 ± 2.8" in text
    assert "0.0500 ± 0.0141" in text


def test_what_a_run_costs_may_be_a_watched_text(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Its order is another than that of harm, and a text that no run watched is refused."""

    def run(name: str, method: str, harm: float, rise: float) -> Path:
        place = finished(tmp_path / name, method, harm=harm)
        content = json.loads((place / "continual.json").read_text())
        content["stages"][-1]["watched"]["wiki.txt"] = 2.0 + rise
        (place / "continual.json").write_text(json.dumps(content))
        return place

    runs = [run("1", "sculptor", 0.1, 0.3), run("2", "full", 0.2, 0.2)]
    assert [point.method for point in frontier(runs).points] == ["sculptor (curvature)", "full"]
    found = frontier(runs, "wiki.txt")
    assert [point.method for point in found.points] == ["full", "sculptor (curvature)"]
    assert [point.cost(found.against).mean for point in found.points] == pytest.approx([0.2, 0.3])  # type: ignore[union-attr]
    found = frontier(runs, "harm.first")
    assert [point.cost(found.against).mean for point in found.points] == pytest.approx([0.5, 1.0])  # type: ignore[union-attr]
    refused = cli("frontier", *runs, "--against", "other.txt")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--against other.txt: expected one of harm, harm.first, wiki.txt, which the runs measured" in refused.err


def test_a_text_may_be_called_as_harm_is_and_many_find_their_place(tmp_path: Path, cli: Callable[..., Result]) -> None:
    def run(name: str, method: str, **more: Any) -> Path:
        place = finished(tmp_path / name, method, harm=None, **more)
        content = json.loads((place / "continual.json").read_text())
        for i, stage in enumerate(content["stages"]):
            stage["watched"] = dict.fromkeys(("harm", "a-long-name-of-a-text.txt", "wiki.txt"), 2.0 + i)
        (place / "continual.json").write_text(json.dumps(content))
        return place

    runs = [run("1", "sculptor"), run("2", "full"), run("3", "full", seed=1)]
    assert [point.cost("harm").mean for point in frontier(runs, "harm").points] == [2.0, 2.0]  # type: ignore[union-attr]
    text = cli("frontier", *runs).out
    assert max(map(len, text.splitlines())) <= 100
    assert "also watched, see --html or --json: wiki.txt" in text


def test_orders_of_tasks_are_points_of_their_own(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "1"), finished(tmp_path / "2", tasks=["b", "a"], plan={"tasks": [{"name": "b"}]})]
    assert sorted(point.name.rpartition(", ")[2] for point in frontier(runs).points) == ["a first", "b first"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    first = finished(tmp_path / "1")
    for i, (more, said) in enumerate(
        [
            ({"tasks": ["a", "c"]}, "tasks a, c, expected a, b as in"),
            ({"split": "validation"}, "split validation, expected test as in"),
            ({"metric": "loss"}, "metric loss, expected accuracy as in"),
            ({}, "a run of the same plan and seed 0 is there already"),
        ]
    ):
        with pytest.raises(SettingsError, match=said):
            frontier([first, finished(tmp_path / f"other{i}", **more)])
    with pytest.raises(SettingsError, match="no runs"):
        frontier([])
    with pytest.raises(DataError, match="name the output of a finished `sculptor continual`"):
        frontier([tmp_path / "none"])
    with pytest.raises(DataError, match="expected the base and one more"):
        frontier([finished(tmp_path / "short", stages=[])])


def test_every_field_damaged_is_one_line(tmp_path: Path) -> None:
    content = json.loads((finished(tmp_path / "1") / "continual.json").read_text())
    tried = 0
    content["stages"] = content["stages"][:1]
    for what, changed, must_fail in mutations(Finished, content, {}):
        try:
            read_json(Finished, json.dumps(changed), "continual.json", DataError, "name another")
        except DataError as error:
            assert "\n" not in str(error)
            tried += 1
        else:
            assert not must_fail or what == "surprise = 1", what  # a later version may say more
    assert tried > 30


def test_a_line_goes_through_settings_not_through_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(plot, "_save", lambda figure, _: drawn.append(figure))
    back = ["b", "a"]
    runs = [
        finished(tmp_path / str(i), method, harm=0.01 * (i + 1), rate=rate, tasks=tasks, plan=plan | {"tasks": tasks})
        for i, (method, rate, tasks) in enumerate(
            [
                ("sculptor", 1e-3, ["a", "b"]),
                ("sculptor", 1e-4, ["a", "b"]),
                ("sculptor", 1e-3, back),
                ("full", 1e-3, back),
            ]
        )
        for plan in [{"model": "m", "train": {"seed": 0, "learning_rate": rate}, "method": method}]
    ]
    found = frontier(runs)
    assert [point.tasks for point in found.points] == [("a", "b"), ("a", "b"), ("b", "a"), ("b", "a")]
    plot.plot_frontier(found, tmp_path / "f.png")
    (axes,) = drawn[0].axes
    assert [len(of.lines[0].get_xdata()) for of in axes.containers] == [2, 1, 1]
    assert len({of.lines[0].get_color() for of in axes.containers[:2]}) == 1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sculptor (curvature)", "full"]


def test_the_command_prints_draws_and_writes_a_page(tmp_path: Path, cli: Callable[..., Result]) -> None:
    pytest.importorskip("matplotlib")
    runs = [finished(tmp_path / "1"), finished(tmp_path / "2", "full", average=0.6, harm=0.4)]
    found = cli("frontier", *runs, "--plot", tmp_path / "f.png", "--html", tmp_path / "f.html")
    assert found.code == 0, found
    assert "sculptor (curvature)" in found.out
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert page.count('class="mark"') == 6  # three pictures of two points
    assert page == frontier_page(frontier(runs))
    again = cli("frontier", *runs, "--html", tmp_path / "f.html")
    assert (again.code, again.err.count("\n")) == (1, 1)
    assert "exists already" in again.err
    assert json.loads(cli("frontier", *runs, "--json").out)["points"][0]["harm"]["mean"] == 0.02
    unmeasured = finished(tmp_path / "3", harm=None)
    assert cli("frontier", unmeasured, "--plot", tmp_path / "g.png").code == 0
    assert read_finished(runs[0]).harm == Harm(0.02, 0.002, 0.1, 0.02, 9, 90)
