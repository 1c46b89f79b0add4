"""Positions that turn by the longest row: a row is never read in another way for what stands beside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import IDS, SMALL, Result, make_tokenizer, save_checkpoint, task_rows, write_rows

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.errors import DataError
from sculptor.evaluation.answers import greedy
from sculptor.evaluation.readers import open_reader
from sculptor.model.load import load_model

LIMIT = 32
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": LIMIT,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": LIMIT},
}  # fmt: skip


def saved(path: Path, rope: str) -> Path:
    torch.manual_seed(0)
    told = SMALL | {"max_position_embeddings": 128 if rope == "longrope" else LIMIT, "head_dim": 8}
    config = transformers.LlamaConfig(**told, rope_parameters=ROPES[rope], **IDS)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    long = {"prompt": " ".join(["w1"] * 60), "completion": " w2"}
    return write_rows(tmp_path / "rows.jsonl", [*task_rows(count=4), long])


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_long_and_short_rows_are_not_read_together(
    rows: Path, tmp_path: Path, cli: Callable[..., Result], offload: str
) -> None:
    model = saved(tmp_path / "model", "longrope")
    asked = ("--device", "cpu", "--offload", offload)
    refused = cli("evaluate", model, "--data", rows, *asked)
    assert refused.code == 1
    assert "in a forward pass: this model turns positions by the longest (longrope)" in refused.err
    assert "--max-length 32" in refused.err
    alone = cli("evaluate", model, "--data", rows, *asked, "--batch-size", 1, "--json")
    assert alone.code == 0, alone.err
    assert alone.json["loss"] == pytest.approx(plain_loss(model, rows), abs=1e-5)
    short = cli("evaluate", model, "--data", rows, *asked, "--max-length", LIMIT)
    assert short.code == 0, short.err


def plain_loss(model: Path, rows: Path) -> float:
    """Row by row, of completions with their end."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        target = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        total -= float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())
        count += len(target)
    return total / count


def test_training_on_both_wants_one_row_a_pass(rows: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    model = saved(tmp_path / "model", "longrope")
    assert cli("analyze", model, "--preserve", 0.5, "-o", tmp_path / "archive", "--device", "cpu").code == 0
    told = (
        "train",
        model,
        "--subspaces",
        tmp_path / "archive",
        "--data",
        rows,
        "--max-steps",
        2,
        "--batch-size",
        5,
        "--device",
        "cpu",
    )
    refused = cli(*told, "-o", tmp_path / "together")
    assert refused.code == 1
    assert "--micro-batch-size 1" in refused.err
    assert not (tmp_path / "together").exists()
    assert cli(*told, "-o", tmp_path / "alone", "--micro-batch-size", 1).code == 0


def test_positions_of_what_was_read_before_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "model", "dynamic"))
    model = load_model(checkpoint, torch.device("cpu")).model
    model(input_ids=torch.full((1, LIMIT), 4))
    with pytest.raises(DataError, match=r"longest row that it has read \(dynamic\)"):
        model(input_ids=torch.full((1, LIMIT + 1), 4))


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_padding_ends_where_positions_turn_otherwise(tmp_path: Path, rope: str) -> None:
    """A row that fits must not be refused for what it is padded to; one that does not is padded no further than it is long."""
    widths = load_model(open_checkpoint(saved(tmp_path / "model", rope)), torch.device("cpu")).padded_to(24)
    assert [widths.of(longest) for longest in (20, 24, 25, LIMIT, LIMIT + 1)] == [24, 24, LIMIT, LIMIT, LIMIT + 1]


def test_dynamic_positions_go_by_the_model_s_own_length(tmp_path: Path) -> None:
    """Whatever else the configuration says of an original one."""
    path = saved(tmp_path / "model", "dynamic")
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 8
    (path / "config.json").write_text(json.dumps(config))
    load_model(open_checkpoint(path), torch.device("cpu")).model(input_ids=torch.full((1, LIMIT), 4))


def test_answers_beyond_the_length_are_read_whole(tmp_path: Path) -> None:
    """Behind a cache keys would be turned short and queries long."""
    loaded = load_model(open_checkpoint(saved(tmp_path / "model", "longrope")), torch.device("cpu"))
    prompt = [4 + i % 20 for i in range(LIMIT - 1)]
    (found,) = greedy(open_reader(loaded, [prompt]), 6, ())
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids[len(prompt) :]


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    model = load_model(open_checkpoint(save_checkpoint(tmp_path / "model")), torch.device("cpu")).model
    assert not model._forward_pre_hooks
