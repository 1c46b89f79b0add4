"""Where an answer ends: at the tokenizer's end of sequence, unless generation does not stop there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Result, make_tokenizer, save_checkpoint, task_rows, write_rows

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.configuration import stop_ids
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.edges import answer_end, completion_ids, end_answers_at, special_ids
from sculptor.model.load import load_tokenizer

END, MASK = 0, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer ends sequences with <mask>, which `generate` reads over."""
    path = save_checkpoint(tmp_path_factory.mktemp("ends") / "model")
    content = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(content | {"eos_token": "<mask>"}))
    return path


def test_an_answer_ends_where_generation_stops(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint, inspect_architecture(checkpoint))
    assert (tokenizer.eos_token_id, stop_ids(checkpoint), answer_end(tokenizer)) == (MASK, (END,), END)
    assert completion_ids(tokenizer, "w1")[-1] == END
    assert tokenizer.eos_token == "<mask>", "templates write what they wrote"


def test_only_special_tokens_end_anything() -> None:
    for stops, end in (
        ((), END),
        ((END, MASK), END),
        ((MASK, END), END),
        ((9, MASK), MASK),
        ((9,), END),
        ((3,), END),
        ((999,), END),
    ):
        tokenizer = make_tokenizer()
        end_answers_at(tokenizer, stops)
        assert answer_end(tokenizer) == end, stops


def test_tokens_that_are_added_later_are_seen() -> None:
    tokenizer = make_tokenizer()
    end_answers_at(tokenizer, (MASK,))
    assert len(tokenizer) not in special_ids(tokenizer)
    tokenizer.add_tokens(["<turn>"])
    assert tokenizer.convert_tokens_to_ids("<turn>") in special_ids(tokenizer)


def test_a_tuned_model_stops_by_itself(cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    task = [row | {"completion": "w33"} for row in task_rows()]
    rows = write_rows(tmp_path / "rows.jsonl", task)
    assert cli("analyze", model, "--basis", "random", "--preserve", 0.1, "-o", tmp_path / "archive").code == 0
    found = cli(
        "train", model, "--subspaces", tmp_path / "archive", "--data", rows, "-o", tmp_path / "tuned", "--epochs", 10,
        "--batch-size", 8, "--learning-rate", "2e-2", "--device", "cpu",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "answers end with <end>, where generation stops, and not with the tokenizer's own" in found.err
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    row = task[0]
    asked = torch.tensor([tokenizer(row["prompt"]).input_ids])
    said = tuned.generate(asked, max_new_tokens=5, do_sample=False)[0, asked.shape[1] :].tolist()
    assert said == [*tokenizer(row["completion"]).input_ids, END]
    assert cli("evaluate", tmp_path / "tuned", "--data", rows, "--exact-match").err.count("answers end with") == 1
