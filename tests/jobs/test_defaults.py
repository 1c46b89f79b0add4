"""What is protected where nobody said: by `analyze`, and by a training without an archive."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sculptor import AnalyzeSettings, Archive, TrainSettings, train, verify
from sculptor.archive.manifest import Manifest
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import OutputError, SettingsError, Stopped
from sculptor.jobs import defaults
from sculptor.validation import sign

COVERS = ["sculptor.tasks.first_archive"]
SHORT = TrainSettings(max_steps=3, batch_size=8, learning_rate=1e-2, device="cpu")
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "_CPU_TOKENS", (400, 400))


def test_what_the_model_says_is_protected(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    found = cli("analyze", model, "-o", tmp_path / "a", "--device", "cpu")
    assert found.code == 0, found.err
    chosen = "--basis curvature --data self --calibration-tokens 400"
    assert f"chosen: {chosen}: protects what the loss depends on" in found.err
    assert "it takes 400 tokens" in found.err
    assert cli("analyze", model, "-o", tmp_path / "b", "--device", "cpu", *chosen.split()).code == 0
    first, second = Archive(tmp_path / "a").manifest, Archive(tmp_path / "b").manifest
    assert (first.tensors, first.matrices, first.settings) == (second.tensors, second.matrices, second.settings)
    assert (first.settings.basis, first.settings.data) == ("curvature", ("self",))


def test_a_chat_model_talks(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    found = cli("analyze", model, "-o", tmp_path / "a", "--device", "cpu", "--max-length", 48)
    assert found.code == 0, found.err
    assert "--data self --chat" in found.err
    assert "through its chat template" in found.err
    assert Archive(tmp_path / "a").manifest.settings.chat


def test_given_data_are_calibrated_on(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows())
    found = cli("analyze", model, "-o", tmp_path / "a", "--data", rows, "--device", "cpu", "--json")
    assert found.json["basis"] == "curvature"
    assert found.err.startswith(
        "chosen: --basis curvature --calibration-tokens 400: protects what the loss depends on\n"
    )


def test_options_of_the_weights_choose_these(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    found = cli("analyze", model, "-o", tmp_path / "a", "--preserve", 0.5, "--device", "cpu", "--json")
    assert found.json["basis"] == "weights"
    assert found.err.startswith("chosen: --basis weights: ")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize("command", ["analyze", "train"])
def test_a_model_that_cannot_sample(cli: Callable[..., Result], tmp_path: Path, command: str) -> None:
    model, rows = save_checkpoint(tmp_path / "model", "bert"), write_rows(tmp_path / "r.jsonl", task_rows("text"))
    more = ("--data", rows) if command == "train" else ()
    found = cli(command, model, "-o", tmp_path / "out", "--device", "cpu", *more)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert ("give --data, or --basis weights" if command == "analyze" else "give --protect-data") in found.err
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith("out")] == []


def test_tokens_fit_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    for size, tokens in ((1e6, 30_000), (134.5e6, 3_700), (7e9, 2_000)):
        monkeypatch.setattr(defaults, "num_parameters", lambda _, size=size: size)
        assert defaults.tokens_for(checkpoint, torch.device("cpu")) == tokens
        assert defaults.tokens_for(checkpoint, torch.device("cuda")) == 100_000


def test_an_archive_of_the_old_default_is_of_weights(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    assert cli("analyze", model, "-o", tmp_path / "a", "--basis", "weights", "--device", "cpu").code == 0
    content = json.loads((tmp_path / "a" / "archive.json").read_text())
    content["settings"]["basis"] = None
    content.pop("sha256")
    text = json.dumps(content | {"sha256": sign(content)}).encode()
    assert Manifest.from_json(text, "archive.json").settings.basis == "weights"


def test_training_without_an_archive(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows())
    short = ("--max-steps", 3, "--learning-rate", 1e-2, "--device", "cpu")
    found = cli("train", model, "--data", rows, "-o", tmp_path / "out", *short)
    assert found.code == 0, found.err
    assert "chosen: --basis curvature --data self" in found.err
    assert json.loads((tmp_path / "out" / "sculptor.json").read_text())["analyzed"] is True
    assert "sculptor verify BASE THIS --subspaces THIS/analyzed" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out.partial").exists()
    assert verify(model, tmp_path / "out", tmp_path / "out" / "analyzed", device="cpu").passed
    # The same by hand.
    assert cli("analyze", model, "-o", tmp_path / "a", "--device", "cpu").code == 0
    found = cli("train", model, "--subspaces", tmp_path / "a", "--data", rows, "-o", tmp_path / "by-hand", *short)
    assert found.code == 0, found.err
    assert json.loads((tmp_path / "by-hand" / "sculptor.json").read_text())["analyzed"] is False
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "by-hand"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # Replaced unasked: never.
    assert cli("train", model, "--data", rows, "-o", tmp_path / "out", *short).code == 1
    assert cli("train", model, "--data", rows, "-o", tmp_path / "out", *short, "--overwrite").code == 0


def test_a_stopped_one_goes_on_with_its_archive(tmp_path: Path) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows())
    train(model, None, [rows], tmp_path / "whole", SHORT, protect_data=[rows])
    polls = iter([None, 15])
    with pytest.raises(Stopped):
        train(model, None, [rows], tmp_path / "cut", SHORT, protect_data=[rows], stop=lambda: next(polls))
    archive = tmp_path / "cut.partial" / "analyzed" / "archive.json"
    before = archive.stat().st_mtime_ns
    with pytest.raises(Exception, match="other --protect-data"):
        train(model, None, [rows], tmp_path / "cut", SHORT, resume=True)
    assert archive.stat().st_mtime_ns == before
    # The same rows in another order are another run, of what is learned and of what is protected.
    lines = rows.read_text().splitlines(keepends=True)
    (tmp_path / "turned").mkdir()
    turned = tmp_path / "turned" / rows.name
    turned.write_text("".join(lines[::-1]))
    for data, protected, message in (
        (turned, rows, "other settings|other inputs"),
        (rows, turned, r"other --protect-data \(rows; the data files hold other rows now\)"),
    ):
        with pytest.raises(OutputError, match=message):
            train(model, None, [data], tmp_path / "cut", SHORT, protect_data=[protected], resume=True)
    # What is protected was read by a tokenizer, and through a template.
    for name, change in (("tokenizer_config.json", '{"w1": 1,'), ("chat_template.jinja", "{{ messages }}")):
        file = model / name
        known = file.read_text() if file.exists() else None
        file.write_text(change + known.lstrip("{") if known else change)
        with pytest.raises(OutputError, match="made with another tokenizer or other --protect-data"):
            train(model, None, [rows], tmp_path / "cut", SHORT, protect_data=[rows], resume=True)
        file.unlink() if known is None else file.write_text(known)
    # What somebody put there stays, is named, and hinders until it is moved.
    for name in ("output/notes.txt", "analyzed/notes.txt", "state/step-notes.txt"):
        mine = tmp_path / "cut.partial" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        for way in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputError, match=f"{name} is nothing that sculptor wrote"):
                train(model, None, [rows], tmp_path / "cut", SHORT, protect_data=[rows], **way)  # type: ignore[arg-type]
        assert mine.read_text() == "mine"
        mine.unlink()
    left = {"key": 1, "shards": [], "records": {}, "tensors": {}}  # killed before that was removed
    (archive.parent / "progress.json").write_text(json.dumps(left))
    train(model, None, [rows], tmp_path / "cut", SHORT, protect_data=[rows], resume=True)
    assert not (tmp_path / "cut" / "analyzed" / "progress.json").exists()
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "cut" / "analyzed" / "archive.json").stat().st_mtime_ns == before


def test_keys_that_nothing_reads_are_named(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Once each, wherever rows are read: `prompts`, `weigth`, `name`."""
    model, rows = save_checkpoint(tmp_path / "model"), tmp_path / "rows.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    talk = [{"role": "user", "content": "w1", "name": "w2"}, {"role": "assistant", "content": "w3"}]
    given = [{"messages": talk, "prompts": "w1"}, {"messages": talk, "weigth": 0}, {"messages": talk[:1] + talk[1:]}]
    rows.write_text("\n".join(map(json.dumps, given)) + "\n")
    keys = "rows.jsonl: not read: 'prompts' of 1 rows, 'weigth' of 1 rows"
    for command in (
        ("train", "--data", rows, "--protect-data", rows, "-o", tmp_path / "out", "--max-steps", 1),
        ("evaluate", "--data", rows),
        ("analyze", "--data", rows, "-o", tmp_path / "a"),
        ("analyze", "--data", rows, "--basis", "weights", "-o", tmp_path / "b"),
    ):
        found = cli(command[0], model, *command[1:], "--device", "cpu")
        assert found.code == 0, found.err
        assert found.err.count(keys) == (2 if command[0] == "train" else 1), found.err
        assert "in messages: 'name' of 3 rows" in found.err


@pytest.mark.slow
def test_what_is_protected_is_read_through_the_same_template(tmp_path: Path) -> None:
    """Conversations of old, and what a chat model says: not through its default, where the training has another."""
    model, template = save_checkpoint(tmp_path / "model"), tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}w39 {{ m['content'] }} {% endfor %}")
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": talk}] * 4)
    plain = write_rows(tmp_path / "plain.jsonl", task_rows(count=4))
    settings = replace(SHORT, max_steps=1, chat_template=str(template))

    def analyzed(name: str, *protected: Path) -> str | None:
        train(model, None, [rows], tmp_path / name, settings, protect_data=protected)
        return Archive(tmp_path / name / "analyzed").manifest.settings.chat_template

    assert analyzed("rows", rows) == "other.jinja"
    assert analyzed("plain", plain) is None
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert analyzed("said") == "other.jinja"


def test_bad_rows_are_refused_before_the_analysis(tmp_path: Path) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": 3}\n')
    said: list[str] = []
    with pytest.raises(Exception, match="prompt"):
        train(model, None, [rows], tmp_path / "out", SHORT, notice=said.append)
    assert said == []
    assert not (tmp_path / "out.partial").exists()


def test_data_to_protect_are_for_a_training_without_an_archive(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--protect-data without effect: --subspaces"):
        train("model", "archive", ["rows.jsonl"], tmp_path / "out", replace(SHORT), protect_data=["self"])


def test_chat_stays_refused_without_sampling() -> None:
    with pytest.raises(SettingsError, match="--chat without effect"):
        AnalyzeSettings(data=("rows.jsonl",), chat=True)
