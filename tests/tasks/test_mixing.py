"""Weights of several data, from the command line to the record."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.errors import OutputError, SettingsError, Stopped
from sculptor.jobs.job import open_base, read_task


def test_weights_decide_an_epoch(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    task = write_rows(tmp_path / "task.jsonl", task_rows(count=9))
    text = write_rows(tmp_path / "text.jsonl", task_rows("text", 20))
    assert cli("analyze", model, "-o", tmp_path / "archive", "--preserve", 0.5, "--device", "cpu").code == 0
    data = ("--data", f"{task}:0.75", "--data", f"{text}:0.25")
    found = cli(
        "train", model, "--subspaces", tmp_path / "archive", *data, "-o", tmp_path / "out", "--batch-size", 4, "--epochs", 1,
        "--device", "cpu",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "an epoch takes 9 of 9 from task.jsonl, 3 of 20 from text.jsonl" in found.err
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert record["result"]["steps"] == 3
    assert record["data"]["files"] == ["task.jsonl", "text.jsonl"]
    assert record["data"]["weights"] == [0.75, 0.25]
    shown = cli("data", data[1], data[3], "--model", model, "--json").json
    assert (shown["num_rows"], shown["num_epoch"]) == (29, 12)
    assert [source["num_epoch"] for source in shown["sources"]] == [9, 3]
    planned = cli("estimate", model, *data, "--batch-size", 4, "--device", "cpu", "--json").json
    assert planned["steps"] == 3
    moments = ("analyze", model, "--basis", "curvature", *data, "--device", "cpu", "-o", tmp_path / "moments")
    assert cli(*moments).code == 0
    manifest = json.loads((tmp_path / "moments" / "archive.json").read_text())
    assert manifest["tasks"][0]["weights"] == [1.5, 0.5]
    wrong = cli("evaluate", model, *data, "--device", "cpu")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)


def test_replay_is_mixed_in_and_is_no_part_of_the_task(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    task = write_rows(tmp_path / "task.jsonl", task_rows(count=18))
    text = write_rows(tmp_path / "text.jsonl", task_rows("text", 30))
    asked = ("--preserve", 0.5, "--device", "cpu")
    assert cli("analyze", model, "-o", tmp_path / "archive", *asked).code == 0

    def run(name: str, *more: object) -> Result:
        return cli("train", model, "--subspaces", tmp_path / "archive", "--data", task, "-o", tmp_path / name, "--epochs", 1,
                   "--batch-size", 4,
                   "--learning-rate", 1e-2, "--device", "cpu", *more)  # fmt: skip

    found = run("out", "--replay", f"{text}:0.2", "--replay", "self:0.2")
    assert found.code == 0, found.err
    assert (
        "an epoch takes 18 rows of the task and mixes in 6 from text.jsonl (30 rows), 6 from self (others in each)"
        in found.err
    )
    assert "--replay self: 7 rows that the model says are drawn first" in found.err
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert record["result"]["steps"] == 8
    assert record["examples"]["rows"] == 18
    assert record["data"]["replay"] == [{"name": "text.jsonl", "share": 0.2}, {"name": "self", "share": 0.2}]
    plain, mixed = (tmp_path / name / "model.safetensors" for name in ("plain", "out"))
    assert run("plain").code == 0
    assert plain.read_bytes() != mixed.read_bytes()
    for more, message in (
        (("--replay", f"{text}:0.6", "--replay", "self:0.5"), "shares of 1.1 in all leave nothing"),
        (("--replay", "self", "--replay", "self:0.2"), "--replay self: given twice"),
        (("--replay", tmp_path / "nothing.jsonl"), "nothing.jsonl"),
    ):
        wrong = run("wrong", *more)
        assert wrong.code in (1, 2)
        assert wrong.err.count("\n") == 1
        assert message in wrong.err
        assert not (tmp_path / "wrong").exists()


def test_a_template_for_some_of_the_rows_is_of_use(tmp_path: Path) -> None:
    """Those of the task or those that are mixed in; for none it is refused."""
    model = save_checkpoint(tmp_path / "model")
    (tmp_path / "t.jinja").write_text("{% for message in messages %}{{ message['content'] + ' w2 ' }}{% endfor %}")
    rows = task_rows(count=4)
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    pairs, talks = (
        write_rows(tmp_path / "p.jsonl", rows),
        write_rows(tmp_path / "m.jsonl", [{"messages": t} for t in turns]),
    )
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = TrainSettings(max_steps=1, device="cpu", chat_template=str(tmp_path / "t.jinja"))
    for i, (data, replay) in enumerate([(talks, pairs), (pairs, talks)]):
        train(model, tmp_path / "archive", [data], tmp_path / f"out{i}", settings, replay=[f"{replay}:0.5"])
    with pytest.raises(SettingsError, match="--chat-template without effect"):
        train(model, tmp_path / "archive", [pairs], tmp_path / "out", settings, replay=[f"{pairs}:0.5"])


def test_rows_beside_the_task_that_do_not_fit_are_told(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    long = [{"prompt": "w1 " * 40, "completion": "w2"}, {"prompt": "w1", "completion": "w2 " * 40}]
    task = write_rows(tmp_path / "task.jsonl", task_rows(count=2))
    beside = write_rows(tmp_path / "beside.jsonl", [*task_rows(count=2), *long])
    told: list[str] = []
    checkpoint, architecture = open_base(model)
    read_task(checkpoint, architecture, task, beside, TrainSettings(max_length=16), told.append, [(beside, 0.2)])
    counts = "1 rows or turns dropped (completion too long), 1 with the middle of the prompt cut"
    assert told == [f"--eval-data: {counts}", f"--replay beside.jsonl: {counts}"]


def test_a_run_is_taken_up_with_the_same_shares_and_evaluation(tmp_path: Path) -> None:
    """Neither changes a row that is read, and both change what is trained, or kept."""
    model = save_checkpoint(tmp_path / "model")
    data = [write_rows(tmp_path / f"{name}.jsonl", task_rows(count=9)) for name in "ab"]
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))

    def run(weights: tuple[float, float] | None, *more: Path, **options: object) -> None:
        given = data if weights is None else [f"{file}:{weight}" for file, weight in zip(data, weights, strict=True)]
        settings = TrainSettings(max_steps=3, save_every=1, batch_size=4, device="cpu")
        train(model, tmp_path / "archive", given, tmp_path / "out", settings, eval_data=list(more), **options)

    polls = iter([None, 15])
    with pytest.raises(Stopped):
        run((0.75, 0.25), data[0], stop=lambda: next(polls))
    for weights, more, message in (
        (None, (data[0],), r"mixture; mixture was .*, now None"),
        ((0.5, 0.5), (data[0],), r"mixture; mixture.weights was \[0.75, 0.25\], now \[0.5, 0.5\]"),
        ((0.75, 0.25), (), "eval_data was '9 rows', now None"),
    ):
        with pytest.raises(OutputError, match=message):
            run(weights, *more, resume=True)
    run((0.75, 0.25), data[0], resume=True)
    record = json.loads((tmp_path / "out" / "sculptor.json").read_text())
    assert record["data"]["weights"] == [0.75, 0.25]
    assert record["eval_data"]["files"] == ["a.jsonl"]
    assert record["eval_data"]["rows"] == 9
