"""`train` as a whole: what it decides, says and notes, what it refuses, and what is left when it ends."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, evaluate, train, verify
from sculptor.errors import OutputError, SettingsError, Stopped
from sculptor.model.harm import Harm
from sculptor.planning import placement
from sculptor.report.text import size
from sculptor.report.train import train_text

COVERS = [
    "sculptor.jobs.finish",
    "sculptor.jobs.train_loop",
    "sculptor.jobs.train_record",
    "sculptor.jobs.train_report",
    "sculptor.report.train",
]
SHORT = TrainSettings(max_steps=3, batch_size=8, learning_rate=1e-2, device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its archive, and rows."""
    path = tmp_path_factory.mktemp("train")
    save_checkpoint(path / "model")
    analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    write_rows(path / "rows.jsonl", task_rows())
    return path


def run(made: Path, output: Path, settings: TrainSettings = SHORT, **more: Any) -> Any:
    data = more.pop("data", [made / "rows.jsonl"])
    return train(made / "model", made / "archive", data, output, settings, **more)


def record(output: Path) -> Any:
    return json.loads((output / "sculptor.json").read_text())


def test_the_task_is_named_in_the_archive(made: Path, tmp_path: Path) -> None:
    (tmp_path / "poems").mkdir()
    data = [write_rows(tmp_path / "poems" / "train.jsonl", task_rows()), made / "rows.jsonl"]
    run(made, tmp_path / "out", data=data)
    task = Archive(tmp_path / "out" / "subspaces").manifest.tasks[-1]
    assert (task.name, task.kind) == ("poems", "training")
    assert task.details["data"] == ["train.jsonl", "rows.jsonl"], "names, no paths"
    assert (task.details["rows"], task.details["steps"]) == (48, 3)
    assert (task.details["learning_rate"], task.details["relative_rate"]) == (1e-2, None)


def test_the_report_the_record_and_the_metrics_say_the_same(made: Path, tmp_path: Path) -> None:
    report = run(made, tmp_path / "out", replace(SHORT, learning_rate=None))
    found = record(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (report.loop.first_loss, report.loop.last_loss) == (lines[0]["loss"], lines[-1]["loss"])
    assert found["result"]["last_loss"] == report.loop.last_loss
    assert sum(line["tokens"] for line in lines) == report.loop.tokens
    assert max(line["relative_rate"] for line in lines) == found["settings"]["relative_rate"] == report.relative_rate
    assert all("learning_rate" not in line for line in lines)
    assert found["rose"] is report.rose is False
    assert found["num_trainable"] == report.num_trainable == Archive(made / "archive").num_free
    assert found["base"]["name"] == "model"
    assert str(made) not in json.dumps(found), "names and digests, no folders"
    entries = sum(r.shape[0] * r.shape[1] for r in Archive(made / "archive").values())
    assert report.num_trainable + report.num_protected == entries
    assert f"Peak learning rate {report.relative_rate:.3g} of each matrix's RMS" in train_text(report)
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
        for folder in (tmp_path / "out", tmp_path / "out" / "subspaces")
    ]
    shown = train_text(report).splitlines()[-1]
    assert shown == f"{size(sizes[0])} in the checkpoint, {size(sizes[1])} in subspaces/."
    for lost, told in ((0.2, False), (0.4, True)):
        matrices = {name: replace(matrix, rounding_loss=lost) for name, matrix in report.matrices.items()}
        assert ("; --save-dtype float32 keeps all of it." in train_text(replace(report, matrices=matrices))) is told
    for nats, first, told in ((0.01, 0.1, False), (0.06, 0.1, True), (0.01, 0.3, True)):
        loop = replace(report.loop, harm=Harm(nats, 0.001, first, 0.01, 16, 900))
        shown = train_text(replace(report, loop=loop))
        assert ("Other answers have changed" in shown) is told, "in the mean, or in how they begin"
        assert f"begins: {first:.4f} ± 0.0100." in shown
        held = replace(report, loop=replace(loop, steering_harm=0.0196, scaled=3), max_harm=0.02)
        assert "0.0196, of 0.02 allowed (--max-harm)." in train_text(held)
        assert "Updates were scaled back 3 times" in train_text(held)
        assert "allowed" not in train_text(replace(held, loop=loop)), "a limit that was never reached"


def test_the_record_says_what_was_used_where_auto_was_asked_for(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out")
    settings = record(tmp_path / "out")["settings"]
    assert settings["offload"] == "none"
    assert settings["precision"] == "float32", "of a small model"
    assert settings["carry"] == "accumulate"
    assert settings["soften"] == 0.0
    assert settings["max_length"] == 64


def test_evaluation_rows_choose_the_step(made: Path, tmp_path: Path) -> None:
    """With a rate that ruins the model, none of the later steps is the best."""
    ruinous = replace(SHORT, max_steps=6, learning_rate=0.5, schedule="constant", warmup=0, eval_every=1)
    rows = [made / "rows.jsonl"]
    report = run(made, tmp_path / "out", ruinous, eval_data=rows)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    best = min(losses, key=losses.__getitem__)
    assert (report.loop.best_step, report.loop.best_loss) == (best, losses[best])
    assert evaluate(tmp_path / "out", rows, device="cpu").loss == pytest.approx(losses[best], rel=1e-4)
    if best < 6:
        whole = run(made, tmp_path / "whole", ruinous := replace(ruinous, eval_every=None))
        assert whole.loop.best_step is None
        assert ruinous.eval_every is None
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
        assert any(not torch.equal(one[name], two[name]) for name in one)
    assert f"Kept step {best}, evaluation loss" in train_text(report)


def test_of_equal_evaluations_the_first_is_kept(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sculptor.jobs import train_loop as module

    monkeypatch.setattr(module, "mean_loss", lambda *_, **__: (1.25, 0))
    settings = replace(SHORT, eval_every=1)
    report = run(made, tmp_path / "out", settings, eval_data=[made / "rows.jsonl"])
    assert (report.loop.best_step, report.loop.best_loss) == (1, 1.25)


def test_every_fifth_of_the_run_is_evaluated(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out", replace(SHORT, max_steps=11), eval_data=[made / "rows.jsonl"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 11]


def test_a_notice_is_given_only_where_something_was_decided(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    assert run(made, tmp_path / "fits", notice=heard.append).placement == "--offload auto picks none: everything fits"
    assert heard == []
    report = run(made, tmp_path / "asked", replace(SHORT, offload="disk"), notice=heard.append)
    assert report.placement == "--offload disk, as asked"
    assert heard == []
    idle = replace(SHORT, offload_inputs=True)
    report = run(made, tmp_path / "idle", idle, notice=heard.append)
    assert (
        heard
        == [report.placement]
        == ["--offload auto picks none: everything fits; without effect there: --offload-inputs"]
    )
    monkeypatch.setattr(placement, "available_memory", lambda _: (2e8, 2e8))
    report = run(made, tmp_path / "doubt", replace(SHORT, offload="none"), notice=heard.append)
    assert heard[1:] == [report.placement]
    assert "as asked, though it may need" in report.placement


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_every": 2}, r"--eval-every without effect: there is no --eval-data"),
        ({"soften": 1.0}, r"--soften without effect: an archive with basis weights has no moments"),
        ({"memory_rows": 3}, r"--memory-rows without effect"),
        ({"carry": "merge"}, r"--carry merge: an archive with basis weights goes on by accumulate"),
        ({"also_train": ("nothing",)}, r"--also-train 'nothing' matches no unprotected parameter"),
        ({"max_length": 1000}, r"max-length"),
        ({"device": "tpu"}, r"tpu"),
    ],
)
def test_settings_without_effect_are_refused_and_leave_nothing(
    made: Path, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(made, tmp_path / "out", replace(SHORT, **settings))
    assert not list(tmp_path.glob("out*"))


def test_what_was_finished_is_not_resumed(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"out: exists already, there is nothing to resume; pass --overwrite"):
        run(made, tmp_path / "out", resume=True)
    with pytest.raises(OutputError, match=r"out: exists already; choose another --output or pass --overwrite"):
        run(made, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out.partial").exists()


def test_a_loop_that_had_come_to_its_end_is_only_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died while it wrote its output trains nothing again, if its last state was worth the time."""
    from sculptor.tasks import train as module

    worth = replace(SHORT, save_every=1)
    run(made, tmp_path / "whole", worth)
    write = module.write_output

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_output", killed)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "out", worth)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "write_output", write)
    polls: list[int] = []
    report = run(made, tmp_path / "out", worth, resume=True, stop=lambda: polls.append(1))
    assert polls == [], "no step was left"
    assert report.loop.steps == 3
    for file in ("model.safetensors", "subspaces/subspaces-00001.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_resuming_where_nothing_was_left_starts_anew(made: Path, tmp_path: Path) -> None:
    assert run(made, tmp_path / "out", resume=True).loop.steps == 3


def test_a_signal_in_the_last_step_stops_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    """What follows, rows to measure and a checkpoint to write, may take minutes."""
    polls = iter([None, None, 15])
    with pytest.raises(Stopped, match=r"after step 3 of 3; the state is saved"):
        run(made, tmp_path / "out", stop=lambda: next(polls))
    assert not (tmp_path / "out.partial" / "output").exists()
    assert run(made, tmp_path / "out", resume=True).loop.steps == 3


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json"])
def test_a_model_that_speaks_otherwise_is_not_gone_on_with(made: Path, tmp_path: Path, file: str) -> None:
    """In words that no row of the task has, too: the output gets its tokenizer."""
    shutil.copytree(made / "model", tmp_path / "model")
    polls = iter([None, 15])
    arguments = (made / "archive", [made / "rows.jsonl"], tmp_path / "out", replace(SHORT, save_every=1))
    with pytest.raises(Stopped):
        train(tmp_path / "model", *arguments, stop=lambda: next(polls))
    content = json.loads((tmp_path / "model" / file).read_text())
    if file == "tokenizer.json":
        content["normalizer"] = {"type": "Replace", "pattern": {"String": "zebra"}, "content": "w1"}
    else:
        content["eos_token_id"] = 5
    (tmp_path / "model" / file).write_text(json.dumps(content))
    with pytest.raises(OutputError, match=r"saved by a run with other settings \(tokenizer and generation;"):
        train(tmp_path / "model", *arguments, resume=True)


def test_other_settings_are_found_before_the_model_is_loaded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls = iter([None, 15])
    with pytest.raises(Stopped):
        run(made, tmp_path / "out", replace(SHORT, save_every=1), stop=lambda: next(polls))
    monkeypatch.setattr("sculptor.tasks.train.prepare_model", None)
    with pytest.raises(OutputError, match=r"other settings .weight_decay; weight_decay was .*, now 0.5"):
        run(made, tmp_path / "out", replace(SHORT, save_every=1, weight_decay=0.5), resume=True)
    assert list((tmp_path / "out.partial" / "state").glob("step-*"))


def test_an_input_is_no_output(made: Path, tmp_path: Path) -> None:
    for output in (made, made / "model", made / "archive"):
        with pytest.raises(OutputError, match=r"is or holds the input"):
            run(made, output, overwrite=True)
    assert Archive(made / "archive").open_names
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "poem.txt").write_text("roses")
    with pytest.raises(OutputError, match=r"is no output of sculptor .*, so --overwrite does not touch it"):
        run(made, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "poem.txt").read_text() == "roses"


def test_an_output_is_replaced_only_at_success(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(Stopped):
        run(made, tmp_path / "out", overwrite=True, stop=lambda: 15)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    run(made, tmp_path / "out", replace(SHORT, max_steps=5), overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def learned(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the task already, so that only harm can be done."""
    path = tmp_path_factory.mktemp("learned") / "out"
    report = run(made, path, replace(SHORT, max_steps=60))
    assert report.loop.last_loss < 2.2
    return path


@pytest.mark.parametrize(("option", "rate"), [("--learning-rate", 100.0), ("--relative-rate", 1.0)])
def test_a_loss_that_rose_is_the_last_thing_said(
    cli: Callable[..., Result], made: Path, learned: Path, option: str, rate: float, tmp_path: Path
) -> None:
    """And noted, since who looks at a checkpoint later has not seen the last line."""
    arguments = ("--data", made / "rows.jsonl", "--max-steps", 3, "--warmup", 0, "--schedule", "constant", "--clip", 0)
    archive = learned / "subspaces"
    found = cli("train", learned, "--subspaces", archive, *arguments, option, rate, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    lines = found.out.rstrip("\n").splitlines()
    result = record(tmp_path / "out")["result"]
    first, last = result["first_loss"], result["last_loss"]
    assert first < last
    assert lines[-1] == f"The loss ended above where it began ({first:.3f} -> {last:.3f}): lower {option}."
    assert record(tmp_path / "out")["rose"] is True


def test_a_loss_that_fell_is_not_mentioned(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    arguments = ("--data", made / "rows.jsonl", "--max-steps", 4, "--device", "cpu")
    found = cli("train", made / "model", "--subspaces", made / "archive", *arguments, "-o", tmp_path / "out")
    assert found.code == 0, found.err
    *_, wrote, sizes, check = found.out.rstrip("\n").splitlines()
    assert wrote.startswith("Wrote ")
    assert "in the checkpoint" in sizes
    command = shlex.split(check.removeprefix("To check it: "))
    assert command[0] == "sculptor"
    assert cli(*command[1:]).code == 0
    assert "ended above" not in found.out
    assert record(tmp_path / "out")["rose"] is False


def test_openly_trained_tensors_are_declared_over_generations(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "one", replace(SHORT, also_train=("lm_head",)))
    again = replace(SHORT, also_train=("model.norm.weight",))
    rows = [made / "rows.jsonl"]
    report = train(tmp_path / "one", tmp_path / "one" / "subspaces", rows, tmp_path / "two", again)
    assert report.also_trained == ("lm_head.weight", "model.norm.weight")
    found = record(tmp_path / "two")
    assert found["also_trained"] == ["lm_head.weight", "model.norm.weight"]
    assert len(found["lineage"]) == 2
    assert "Trained without protection: lm_head.weight, model.norm.weight." in train_text(report)


@pytest.mark.parametrize("task", ["masked", "classes"])
def test_a_tokenizer_without_an_end_of_sequence_suits_encoders(tmp_path: Path, task: str) -> None:
    """BERT's own has none."""
    base = save_checkpoint(tmp_path / "base", "bert")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(base).eos_token_id is None
    rows = [
        {"text": f"w{i} w{i + 1} w{i + 2}", **({"label": "ab"[i % 2]} if task == "classes" else {})} for i in range(9)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    kind = {"task": "sequence-classification"} if task == "classes" else {}
    settings = TrainSettings(max_steps=2, batch_size=4, device="cpu", **kind)
    train(base, tmp_path / "archive", [data], tmp_path / "out", settings)
    assert verify(base, tmp_path / "out", tmp_path / "archive", device="cpu").passed
    assert evaluate(tmp_path / "out", str(data), device="cpu").loss > 0


def test_an_archive_that_the_model_has_is_not_passed_over_in_silence(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "first")
    said: list[str] = []
    options = replace(SHORT, max_steps=1)
    train(tmp_path / "first", None, [made / "rows.jsonl"], tmp_path / "second", options,
          protect_data=[made / "rows.jsonl"], notice=said.append)  # fmt: skip
    own = tmp_path / "first" / "subspaces"
    assert [line for line in said if line.startswith(f"{own} protects what earlier tasks of this model use")]
