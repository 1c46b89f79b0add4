"""`sculptor edit --choose`: the curve against evaluations of what is written, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, save_checkpoint, slowly, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, evaluate, train, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows some text, what plain training on a task made of it, and an archive of what it knew."""
    path = tmp_path_factory.mktemp("choice")
    start = save_checkpoint(path / "start")
    write_rows(path / "text.jsonl", task_rows("text"))
    write_rows(path / "task.jsonl", task_rows())
    free = AnalyzeSettings(preserve=0.0, device="cpu")

    def learn(model: Path, rows: str, output: str) -> Path:
        analyze(model, path / f"{output}-free", free)
        settings = TrainSettings(max_steps=30, batch_size=24, learning_rate=2e-2, device="cpu", carry="keep")
        train(model, path / f"{output}-free", [path / rows], path / output, settings)
        return path / output

    base = learn(start, "text.jsonl", "base")
    learn(base, "task.jsonl", "tuned")
    analyze(base, path / "archive", AnalyzeSettings(basis="curvature", data=(str(path / "text.jsonl"),), device="cpu"))
    return path


def choose(cli: Callable[..., Result], made: Path, command: str, *more: object) -> Result:
    rows = ("--choose", made / "task.jsonl", "--watch", made / "text.jsonl")
    return cli("edit", command, made / "base", made / "tuned", *rows, *more, "--device", "cpu")


@pytest.mark.parametrize(
    ("command", "more", "count"),
    [
        ("lines", ("--grid", 3), 3),
        ("project", ("--alpha", 0.7), 4),
        *slowly(
            ("interpolate", ("--grid", 5), 5),
            ("threshold", ("--grid", 3), 3),
            ("project", ("--grid", 2, "--soft", 0.5), 2),
        ),
    ],
)
def test_the_curve_is_of_what_would_be_written(
    command: str, more: tuple[object, ...], count: int, cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    archive = ("--subspaces", made / "archive") if command == "project" else ()
    found = choose(cli, made, command, *more, *archive, "-o", tmp_path / "out", "--json")
    assert (found.code, found.err) == (0, "")
    choice = found.json["choice"]
    assert len(choice["points"]) == count
    scores = [2 * point["kept"] + point["back"] for point in choice["points"]]
    assert scores[choice["best"]] == max(scores)
    best = choice["points"][choice["best"]]
    assert found.json["numbers"]["alpha"] == best["alpha"]
    assert found.json["numbers"].get("soft") == best["soft"]
    (by_base, base), (by_tuned, tuned) = choice["base"], choice["tuned"]
    for point in choice["points"]:
        assert point["kept"] == pytest.approx((point["task"] - by_base) / (by_tuned - by_base))
        assert point["back"] == pytest.approx((tuned - point["watch"]) / (tuned - base))
    measured = {
        name: evaluate(tmp_path / "out" if name == "out" else made / name, [made / "text.jsonl"], device="cpu").loss
        for name in ("base", "tuned", "out")
    }
    assert measured == pytest.approx({"base": base, "tuned": tuned, "out": best["watch"]}, abs=1e-5)
    assert evaluate(tmp_path / "out", [made / "task.jsonl"], device="cpu").accuracy == pytest.approx(best["task"])
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert record["choice"]["rows"]["files"] == ["task.jsonl"]
    assert str(made) not in json.dumps(record)
    if command == "project":
        assert verify(made / "base", tmp_path / "out", made / "archive", device="cpu").passed


def test_the_ends_of_interpolation_are_the_inputs(cli: Callable[..., Result], made: Path) -> None:
    found = choose(cli, made, "interpolate", "--grid", 2, "--dry-run", "--json")
    first, last = found.json["choice"]["points"]
    assert (first["kept"], first["back"], last["kept"], last["back"]) == (0, 1, 1, 0)


def test_the_table_fits(cli: Callable[..., Result], made: Path) -> None:
    found = choose(cli, made, "project", "--grid", 2, "--subspaces", made / "archive", "--dry-run")
    assert found.code == 0
    assert max(map(len, found.out.splitlines())) <= 100
    assert found.out.count(" <\n") == 1
    assert "BASE" in found.out.splitlines()[2]


def test_rows_without_labels_are_measured_by_loss(cli: Callable[..., Result], made: Path) -> None:
    found = cli(
        "edit", "interpolate", made / "tuned", made / "base", "--choose", made / "text.jsonl", "--watch", made / "task.jsonl",
        "--grid", 2, "--device", "cpu", "--dry-run", "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert found.json["choice"]["measure"] == "loss"
    assert found.json["choice"]["points"][1]["kept"] == 1


@pytest.mark.parametrize(
    ("rows", "text", "needle", "code"),
    [
        ("text.jsonl", "task.jsonl", "--choose: TUNED is no better than BASE on these rows", 1),
        ("task.jsonl", "task.jsonl", "--watch: TUNED is no worse than BASE on this text", 1),
        ("nowhere.jsonl", "text.jsonl", "nowhere.jsonl", 1),
    ],
)
def test_nothing_to_keep_or_to_bring_back(
    rows: str, text: str, needle: str, code: int, cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    found = cli(
        "edit", "lines", made / "base", made / "tuned", "--choose", made / rows, "--watch", made / text, "-o", tmp_path / "out",
        "--device", "cpu",
    )  # fmt: skip
    assert found.code == code
    (line,) = found.err.strip().splitlines()
    assert needle in line
    assert not list(tmp_path.iterdir())
