"""Answers side by side, from a pipe."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, make_tokenizer, save_checkpoint

from sculptor import chat
from sculptor.errors import CheckpointError, DataError, SettingsError

TEMPLATE = "{% for m in messages %}w9 {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"


@torch.no_grad()
def greedy(path: Path, text: str, count: int) -> str:
    """Token by token, the whole text each time."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), make_tokenizer()
    ids = tokenizer(text).input_ids
    start = len(ids)
    while len(ids) < start + count:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def talkers(path: Path) -> tuple[Path, Path]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(("tuned", "base")):
        save_checkpoint(path / name, seed=seed)
        tokenizer.save_pretrained(path / name)
    return path / "tuned", path / "base"


def test_both_hear_the_same_and_remember_their_own(tmp_path: Path) -> None:
    tuned, base = talkers(tmp_path)
    with chat(tuned, base=base, max_new_tokens=4, device="cpu", system="w8") as session:
        assert session.names == ("tuned", "base")
        first = session.ask("w1")
        second = session.ask("w2")
        session.forget()
        assert session.ask("w1") == first
    for path, one, two in zip((tuned, base), first, second, strict=True):
        begun = "w9 w8 <end> w9 w1 <end> w9"
        assert one.text == greedy(path, begun, 4).strip()
        assert two.text == greedy(path, f"{begun} {one.text} <end> w9 w2 <end> w9", 4).strip()


def test_lines_of_a_pipe_are_answered_side_by_side(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base = talkers(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n\n/new\nw1 w2\n/quit\nw3\n"))
    found = cli("chat", tuned, "--base", base, "--max-new-tokens", 5, "--device", "cpu")
    assert (found.code, found.err) == (0, "")
    blocks = found.out.strip().split("\n\n")
    assert len(blocks) == 2
    assert blocks[0] == blocks[1]
    assert blocks[0].splitlines()[0] == "> w1 w2"
    assert blocks[0].splitlines()[1].split() == ["tuned", "|", "base"]
    assert max(map(len, found.out.splitlines())) <= 100


def test_a_model_without_a_template_goes_on_with_the_text(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_checkpoint(tmp_path / "model")
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    found = cli("chat", model, "--max-new-tokens", 6, "--device", "cpu")
    assert found.err.startswith("model: no chat template, so the text is continued as it is")
    assert found.err.count("\n") == 1
    assert found.out.split("\n")[1].split() == (greedy(model, "w1 w2", 6).split() or ["(nothing)"])
    with pytest.raises(SettingsError, match="--system without effect"):
        chat(model, system="w1", device="cpu")
    with pytest.raises(SettingsError, match=r"--max-new-tokens 16: leaves nothing of the 16 tokens"):
        chat(model, max_new_tokens=16, max_length=16, device="cpu")
    with pytest.raises(CheckpointError, match="does not go on with a text"):
        chat(save_checkpoint(tmp_path / "bert", "bert"), device="cpu")


def test_sampling_follows_the_temperature(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    with chat(model, max_new_tokens=20, temperature=5.0, device="cpu") as session:
        torch.manual_seed(0)
        said = {session.ask("w1")[0].text for _ in range(4)}
    assert len(said) > 1


def test_what_is_longer_than_the_model_takes_is_told(
    cli: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old turns are dropped, whole, the system's words never; what has no room by itself is refused."""
    tuned, _ = talkers(tmp_path)
    told: list[str] = []
    with chat(tuned, max_new_tokens=4, max_length=24, device="cpu", system="w8", notice=told.append) as session:
        said = [session.ask(f"w{i} w2 w3 w4 w5")[0].text for i in range(3)]
        kept = session._speakers[0].history
        assert kept[0]["content"] == "w8"
        assert kept[1]["content"] != "w0 w2 w3 w4 w5"
        assert said[2] == greedy(tuned, "w9 w8 <end> w9 w2 w2 w3 w4 w5 <end> w9", 4).strip()
        with pytest.raises(
            DataError, match=r"tuned: 26 tokens are said, and 20 are the most with 4 for the answer; say"
        ):
            session.ask(" ".join(["w1"] * 20))
        assert session._speakers[0].history == kept, "as before"
    assert told
    assert all(
        line.startswith("tuned: the oldest turn of the conversation is forgotten: no more than 24") for line in told
    )
    model = save_checkpoint(tmp_path / "plain")
    monkeypatch.setattr("sys.stdin", io.StringIO(" ".join(["w1"] * 70) + "\n"))
    found = cli("chat", model, "--device", "cpu")
    assert (found.code, found.err.count("\n")) == (1, 2)
    assert "plain: 70 tokens are said, and 32 are the most with 32 for the answer" in found.err
