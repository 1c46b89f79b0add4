"""Choices against float64 log-probabilities, several references, answers in conversations, watched texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, make_tokenizer, save_checkpoint, task_rows, write_rows
from evaluation.test_ranking import reference_generation
from model.test_decoding import run_again

from sculptor import chat, evaluate
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.asking import end_ids, question_of
from sculptor.data.rows import MessagesRow, read_rows
from sculptor.errors import CheckpointError, DataError, SettingsError
from sculptor.evaluation import answers
from sculptor.evaluation.answers import say, stops_of
from sculptor.model.decoding import decode
from sculptor.model.load import load_model
from sculptor.progress import silent
from sculptor.report.evaluate import measures_rows

TEMPLATE = "{% for m in messages %}w9 {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
CHOICES = [
    {
        "prompt": f"w{i} w{i + 2}",
        "choices": [f"w{(3 * i) % 9} w1", f"w{(5 * i + 1) % 9}", f"w{i % 4} w2 w333"[: 6 + i % 3]],
        "gold": i % 3,
    }
    for i in range(9)
]


def talker(path: Path) -> Path:
    save_checkpoint(path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def bare_score(loaded: Any, prompt: str, choice: str) -> float:
    """log p(choice | prompt) in float64, without an end of sequence."""
    before, behind = (loaded.tokenizer(text).input_ids for text in (prompt, choice))
    logits = loaded.model.double()(input_ids=torch.tensor([before + behind])).logits[0, len(before) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(behind)[:, None]).sum())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_choices_are_ranked_by_log_probability(tmp_path: Path, family: str) -> None:
    path = save_checkpoint(tmp_path / "m", family)
    data = write_rows(tmp_path / "rows.jsonl", CHOICES)
    found = evaluate(path, data, device="cpu")
    loaded = load_model(open_checkpoint(path), torch.device("cpu"))
    plain = normalized = 0
    for row in CHOICES:
        choices: Any = row["choices"]
        scores = [bare_score(loaded, str(row["prompt"]), choice) for choice in choices]
        plain += max(range(3), key=scores.__getitem__) == row["gold"]
        normalized += max(range(3), key=lambda i: scores[i] / len(choices[i])) == row["gold"]
    assert (found.accuracy, found.acc_norm) == (plain / 9, normalized / 9)
    assert (found.labels, found.exact_match) == (None, None)
    assert evaluate(path, data, device="cpu", batch_size=1).accuracy == found.accuracy
    with pytest.raises(SettingsError, match="--labels without effect"):
        evaluate(path, data, labels=["w1"], device="cpu")
    mixed = write_rows(tmp_path / "mixed.jsonl", [*CHOICES, *task_rows(count=5)])
    with pytest.raises(DataError, match=r"mixed.jsonl:1: .* 9 of 14 have choices; evaluate one kind"):
        evaluate(path, mixed, device="cpu")


def test_any_reference_is_right(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    loaded = load_model(open_checkpoint(path), torch.device("cpu"))
    prompts = [f"w{i} w{i + 3}" for i in range(8)]
    said = [loaded.tokenizer.decode(reference_generation(loaded, p, 3), skip_special_tokens=True) for p in prompts]
    rows = [
        {"prompt": p, "references": ["w1 w1 w1", s]} for p, s in zip(prompts, said, strict=True) if len(s.split()) > 0
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = evaluate(path, data, device="cpu", show=2, max_new_tokens=3)
    assert found.exact_match == 1.0
    assert [answer.said for answer in found.answers] == [row["references"][1].strip() for row in rows[:2]]
    rows = [row | {"completion": "w1 w1 w1", "references": ["w2"]} for row in rows]
    assert evaluate(path, write_rows(data, rows), device="cpu", max_new_tokens=3).exact_match == 0.0


def test_conversations_are_answered(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = talker(tmp_path / "m")
    loaded = load_model(open_checkpoint(path), torch.device("cpu"))
    assert end_ids(loaded.tokenizer) == {0}
    rows = []
    for i in range(6):
        asked = f"w9 w{i} <end> w9"
        said = loaded.tokenizer.decode(reference_generation(loaded, asked, 3), skip_special_tokens=True) or "w1"
        talk = [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": said if i % 2 else "w8 w8 w8"}]
        rows.append({"messages": talk})
    (row, *_) = read_rows(rows)
    assert isinstance(row, MessagesRow)
    assert question_of(row, loaded.tokenizer).ids == loaded.tokenizer("w9 w0 <end> w9").input_ids
    data = write_rows(tmp_path / "rows.jsonl", rows)
    quiet = evaluate(path, data, device="cpu")
    assert (quiet.exact_match, quiet.answers) == (None, ())
    found = evaluate(path, data, device="cpu", exact_match=True, show=6, max_new_tokens=3)
    assert found.loss == quiet.loss
    right = [answer.exact for answer in found.answers]
    assert found.exact_match == sum(right) / 6
    assert not any(right[0::2])
    one = evaluate(path, data, device="cpu", exact_match=True, show=6, max_new_tokens=3, batch_size=1)
    assert one.answers == found.answers
    shown = cli("evaluate", path, "--data", data, "--show", 1, "--device", "cpu").out
    assert "asked" in shown
    assert "exact match" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    text = write_rows(tmp_path / "text.jsonl", task_rows("text"))
    with pytest.raises(SettingsError, match="--exact-match and --show without effect"):
        evaluate(path, text, device="cpu", show=1)


def test_recorded_steps_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU records, here without one: answers of several lengths, of which some end."""
    loaded = load_model(open_checkpoint(talker(tmp_path / "m")), torch.device("cpu"))
    prompts = [" ".join(f"w{(i * j) % 9}" for j in range(1 + i % 4)) for i in range(9)]
    usual = say(loaded, prompts, 64, 12, 4, silent(total=9, desc="answer", unit="row"))
    assert len({len(text.split()) for text in usual}) > 1
    count = 0

    def recorded(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return decode(*arguments, record=run_again)

    monkeypatch.setattr(answers, "decode", recorded)
    assert say(loaded, prompts, 64, 12, 4, silent(total=9, desc="answer", unit="row")) == usual
    assert count == 3


def test_one_figure_for_each_watched_text(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    files = [write_rows(tmp_path / f"{name}.jsonl", task_rows(name, 6)) for name in ("text", "pairs")]
    alone = [evaluate(path, file, device="cpu").loss for file in files]
    found = cli(
        "evaluate", path, *(part for file in files for part in ("--watch", file)), "--device", "cpu", "--json"
    ).json
    assert [text["name"] for text in found["watched"]] == ["text.jsonl", "pairs.jsonl"]
    assert [text["loss"] for text in found["watched"]] == pytest.approx(alone)
    assert found["loss"] is None
    wrong = cli("evaluate", path, "--watch", files[0], "--show", 1)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert cli("evaluate", path).err.startswith("error: nothing to measure")


def test_a_base_stands_beside_the_model(cli: Callable[..., Result], tmp_path: Path) -> None:
    model, base = save_checkpoint(tmp_path / "tuned"), save_checkpoint(tmp_path / "model", seed=1)
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(count=4))
    text = write_rows(tmp_path / "text.jsonl", task_rows("text", 4))
    one, other = (evaluate(path, rows, watch=[text], show=2, device="cpu") for path in (model, base))
    told: list[str] = []
    items = (row for row in task_rows(count=4))  # read twice all the same
    found = evaluate(model, items, base=base, watch=[text], show=2, device="cpu", notice=told.append)
    assert len(told) == len(set(told))
    assert found.base is not None
    for mine, alone in ((found, one), (found.base, other)):
        assert (mine.loss, mine.exact_match, mine.accuracy) == (alone.loss, alone.exact_match, alone.accuracy)
        assert mine.watched == alone.watched
        assert [answer.said for answer in mine.answers] == [answer.said for answer in alone.answers]
    assert one.loss != other.loss

    arguments = ("evaluate", model, "--base", base, "--data", rows, "--watch", text, "--show", 2, "--device", "cpu")
    shown = cli(*arguments, "--html", tmp_path / "page.html")
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["measure", "model", "base"] in lines
    assert ["loss", f"{one.loss:.4f}", f"{other.loss:.4f}"] in lines
    assert any(line[:1] == ["text.jsonl"] and line[-1] == f"{other.watched[0].loss:.4f}" for line in lines)
    assert [line[1:] for line in lines if line[:1] == ["base"]] == [answer.said.split() for answer in other.answers]
    assert shown.out.count("; the base: not exact") + shown.out.count("; the base: exact") == 2
    page = (tmp_path / "page.html").read_text()
    assert f"base: {other.loss:.4f}" in page
    assert page.count("base said") == 2
    assert cli(*arguments, "--json").json["base"]["loss"] == other.loss

    foreign = cli("evaluate", model, "--base", save_checkpoint(tmp_path / "bert", "bert"), "--data", text)
    assert (foreign.code, foreign.err.count("\n")) == (2, 1)
    assert "BertForMaskedLM does not do what LlamaForCausalLM does; compare models of one kind" in foreign.err


def test_abilities_are_read(shared: Path) -> None:
    for name in ("arc_easy", "hellaswag", "piqa"):
        rows = read_rows(shared / "data" / "abilities" / f"{name}.jsonl", 20)
        assert all(len(row.choices) > 1 for row in rows)  # type: ignore[union-attr]


def test_what_answers_leave_out_is_told(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = talker(tmp_path / "talk")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(count=4))
    plain = cli("evaluate", path, "--data", rows, "--device", "cpu")
    assert plain.code == 0
    assert "generation_config" not in plain.err
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}))
    told = "talk: answers are what the model itself finds likeliest, without the repetition_penalty, no_repeat_ngram_size of its"
    assert told in cli("evaluate", path, "--data", rows, "--device", "cpu").err
    lines: list[str] = []
    with chat(path, device="cpu", notice=lines.append):
        assert [line for line in lines if line.startswith(told)]
    silent = cli("evaluate", path, "--data", rows, "--no-exact-match", "--device", "cpu")
    assert "generation_config" not in silent.err, "nothing is said then"


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    path = talker(tmp_path / "talk")
    said = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    long = [said[0], {"role": "assistant", "content": "w2 " * 40}]
    rows = [{"messages": said}, {"messages": long}]
    found = evaluate(path, write_rows(tmp_path / "a.jsonl", rows), device="cpu", max_length=16)
    assert (found.num_rows, found.num_dropped, found.num_cut) == (2, 1, 0)
    assert ["rows or turns dropped, too long", "1"] in measures_rows(found)
    pairs = [{"prompt": prompt, "completion": "w2"} for prompt in ("w1", "w1 " * 40)]
    found = evaluate(path, write_rows(tmp_path / "b.jsonl", pairs), device="cpu", max_length=16)
    assert (found.num_rows, found.num_dropped, found.num_cut) == (2, 0, 1)
    assert ["rows with a prompt cut", "1"] in measures_rows(found)


@pytest.mark.parametrize("eos", ["x", [3, "x"]])
def test_an_end_that_is_no_token_is_named(tmp_path: Path, eos: object) -> None:
    model = save_checkpoint(tmp_path / "model")
    loaded = load_model(open_checkpoint(model), torch.device("cpu"))
    loaded.model.generation_config.eos_token_id = eos
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id has 'x'; expected numbers of tokens"
    ):
        stops_of(loaded)
