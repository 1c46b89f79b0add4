"""`train --select-rows`: which rows, that all ways of training choose the same, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Result, make_tokenizer, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, TrainSettings, analyze, train

SETTINGS = TrainSettings(max_steps=2, batch_size=4, learning_rate=1e-2, offload="none", device="cpu", select_rows=0.4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("selection")
    save_checkpoint(root / "model")
    write_rows(root / "rows.jsonl", task_rows(count=10))
    analyze(root / "model", root / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return root


def worst(place: Path, count: int) -> list[dict[str, str]]:
    """By gradients of float64 logits."""
    model, tokenizer = transformers.LlamaForCausalLM.from_pretrained(place / "model").double(), make_tokenizer()
    scores = []
    for row in task_rows(count=10):
        prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
        answer = [*tokenizer.encode(row["completion"], add_special_tokens=False), 0]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].detach()
        error = logits.softmax(-1) - torch.nn.functional.one_hot(torch.tensor(answer), logits.shape[-1])
        scores.append(float(error.norm(dim=-1).mean()))
    order = sorted(range(10), key=lambda i: -scores[i])[:count]
    return [row for i, row in enumerate(task_rows(count=10)) if i in order]


def test_it_is_training_on_the_worst_rows(place: Path, tmp_path: Path) -> None:
    told: list[str] = []
    report = train(
        place / "model",
        place / "archive",
        [str(place / "rows.jsonl")],
        tmp_path / "chosen",
        SETTINGS,
        notice=told.append,
    )
    assert "--select-rows 0.4: 4 of 10 rows are trained on" in told
    assert report.num_examples == 4
    alone = [worst(place, 4)]
    train(place / "model", place / "archive", alone, tmp_path / "alone", replace(SETTINGS, select_rows=None))
    train(
        place / "model",
        place / "archive",
        [str(place / "rows.jsonl")],
        tmp_path / "cpu",
        replace(SETTINGS, offload="cpu"),
    )
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("chosen", "alone", "cpu")]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])
        torch.testing.assert_close(value, found[2][name], rtol=1e-4, atol=1e-5)


def test_what_has_no_sense_is_refused(cli: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    def said(share: str, *data: str) -> str:
        given = [part for each in data for part in ("--data", each)]
        result = cli("train", place / "model", "--subspaces", place / "archive", *given, "-o", tmp_path / "o",
                     "--select-rows", share, "--device", "cpu")  # fmt: skip
        assert result.code in (1, 2)
        return result.err

    assert "--select-rows with weights" in said("0.5", *2 * [f"{place / 'rows.jsonl'}:2"])
    assert "--select-rows" in said("1", str(place / "rows.jsonl"))


def test_steps_are_those_of_the_rows_that_are_kept_and_mixed_in(place: Path, tmp_path: Path) -> None:
    """200 rows: five passes in steps of 7; of half of them in steps of 4; with as many others again in steps of 14."""
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(count=200))
    text = write_rows(tmp_path / "text.jsonl", task_rows("text", 30))
    usual = replace(SETTINGS, max_steps=None, batch_size=None, select_rows=None)
    cases = {
        "all": (usual, (), "--batch-size 7: 145 steps, for 200 rows", 200),
        "half": (replace(usual, select_rows=0.5), (), "--batch-size 4: 125 steps, for 100 rows", 100),
        "mixed": (usual, [(str(text), 0.5)], "--batch-size 14: 145 steps, for 400 rows", 200),
        "both": (replace(usual, select_rows=0.5), [(str(text), 0.5)], "--batch-size 7: 145 steps, for 200 rows", 100),
    }
    for name, (settings, replay, said, count) in cases.items():
        told: list[str] = []
        report = train(
            place / "model",
            place / "archive",
            [str(rows)],
            tmp_path / name,
            settings,
            replay=replay,
            notice=told.append,
        )
        assert f"chosen: --epochs 5 {said}" in told
        assert report.loop.steps == int(said.split()[2])
        assert report.num_examples == count
