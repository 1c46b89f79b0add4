"""Scores from shared caches against scoring every row and label by itself."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tokenizer, save_checkpoint, task_rows, write_rows

from sculptor import evaluate
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.rows import CompletionRow, read_rows
from sculptor.errors import DataError, SettingsError
from sculptor.evaluation import ranking
from sculptor.evaluation.ranking import score_rows
from sculptor.model.load import LoadedModel, load_model
from sculptor.progress import silent

COVERS = ["sculptor.evaluation.readers"]
LABELS = ("w0", "w1 w2", "w3 w4 w5")


def rows_of(tmp_path: Path) -> list[CompletionRow]:
    rows = [
        {"prompt": " ".join(f"w{(i * j) % 30}" for j in range(3 + i % 4)), "completion": LABELS[i % 3]}
        for i in range(9)
    ]
    found = read_rows([write_rows(tmp_path / "rows.jsonl", rows)])
    return [row for row in found if isinstance(row, CompletionRow)]


@torch.no_grad()
def reference_score(loaded: LoadedModel, prompt: str, completion: str) -> float:
    """log p(completion, end | prompt), one sequence, no cache, no padding."""
    prompt_ids = loaded.tokenizer(prompt).input_ids
    target = [*loaded.tokenizer(completion).input_ids, 0]
    if loaded.kind == "seq2seq":
        decoder = torch.tensor([[loaded.model.config.decoder_start_token_id, *target[:-1]]])
        logits = loaded.model(input_ids=torch.tensor([prompt_ids]), decoder_input_ids=decoder).logits[0]
    else:
        logits = loaded.model(input_ids=torch.tensor([prompt_ids + target])).logits[0, len(prompt_ids) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())


@torch.no_grad()
def reference_generation(loaded: LoadedModel, prompt: str, num_new: int) -> list[int]:
    """Greedy tokens, the whole sequence computed anew for each."""
    ids = loaded.tokenizer(prompt).input_ids
    said: list[int] = []
    for _ in range(num_new):
        if loaded.kind == "seq2seq":
            decoder = torch.tensor([[loaded.model.config.decoder_start_token_id, *said]])
            logits = loaded.model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits[0, -1]
        else:
            logits = loaded.model(input_ids=torch.tensor([ids + said])).logits[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] == 0:
            return said[:-1]
    return said


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox", "gemma2", "mistral", "t5", "mixtral"])
def test_scores_equal_single_sequences(tmp_path: Path, family: str) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "m", family)), torch.device("cpu"))
    rows = rows_of(tmp_path)
    bar = silent(total=1, desc="", unit="")
    found = score_rows(loaded, rows, LABELS, 32, 4, bar)
    for row, score in zip(rows, found, strict=True):
        reference = {label: reference_score(loaded, row.prompt, label) for label in LABELS}
        assert -score.loss == pytest.approx(reference[row.completion], abs=2e-3)
        assert score.num_tokens == len(row.completion.split()) + 1
        best = max(reference, key=reference.__getitem__)
        margin = sorted(reference.values())[-1] - sorted(reference.values())[-2]
        if margin > 1e-2:
            assert score.ranked_right == (best == row.completion)
        said = loaded.tokenizer.decode(reference_generation(loaded, row.prompt, 4), skip_special_tokens=True)
        assert score.exact == (said.strip() == row.completion)
    one_by_one = score_rows(loaded, rows, LABELS, 32, 1, bar)
    assert [s.loss for s in one_by_one] == pytest.approx([s.loss for s in found], abs=2e-3)


def test_a_large_vocabulary_is_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "m")), torch.device("cpu"))
    rows, bar = rows_of(tmp_path), silent(total=1, desc="", unit="")
    whole = score_rows(loaded, rows, LABELS, 32, 4, bar)
    entries = 4 * loaded.model.config.vocab_size  # of the longest label and its end
    monkeypatch.setitem(ranking.LOGITS, "cpu", 2 * entries)
    found, largest = [], [0]
    read = ranking._log_probs

    def noted(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        largest.append(logits.numel())
        return read(logits, ids)

    monkeypatch.setattr(ranking, "_log_probs", noted)
    found = score_rows(loaded, rows, LABELS, 32, 4, bar)
    assert max(largest) <= 2 * entries
    assert [score.loss for score in found] == pytest.approx([score.loss for score in whole], abs=1e-5)
    assert [score.ranked_right for score in found] == [score.ranked_right for score in whole]


def test_generation_can_be_exact(tmp_path: Path) -> None:
    loaded = load_model(open_checkpoint(save_checkpoint(tmp_path / "m")), torch.device("cpu"))
    prompts = [f"w{i} w{i + 3}" for i in range(20)]
    said = [loaded.tokenizer.decode(reference_generation(loaded, p, 1), skip_special_tokens=True) for p in prompts]
    rows = [CompletionRow("r", p, s) for p, s in zip(prompts, said, strict=True) if s]
    assert rows
    found = score_rows(loaded, rows, (), 32, 4, silent(total=1, desc="", unit=""))
    by_row = [
        loaded.tokenizer.decode(reference_generation(loaded, row.prompt, 2), skip_special_tokens=True) == row.completion
        for row in rows
    ]
    assert [score.exact for score in found] == by_row
    assert all(score.ranked_right is None for score in found)


def test_keys_that_do_not_apply_are_none(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    text = evaluate(path, [write_rows(tmp_path / "t.jsonl", task_rows("text"))], device="cpu")
    assert (text.accuracy, text.exact_match, text.labels) == (None, None, None)
    assert text.num_tokens > text.num_rows == 24
    pairs = evaluate(path, [write_rows(tmp_path / "p.jsonl", task_rows())], device="cpu")
    assert pairs.labels == ("w0", "w1", "w2", "w3")
    assert pairs.accuracy is not None
    many = [{"prompt": "w0", "completion": f"w{i} w{i + 1}"} for i in range(33)]
    answers = evaluate(path, [write_rows(tmp_path / "m.jsonl", many)], device="cpu")
    assert (answers.accuracy, answers.labels) == (None, None)
    assert answers.exact_match is not None


def test_labels_can_be_given(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    data = write_rows(tmp_path / "p.jsonl", task_rows())
    found = evaluate(path, [data], labels=["w0", "w1", "w2", "w3", "w9"], device="cpu")
    assert found.labels == ("w0", "w1", "w2", "w3", "w9")
    with pytest.raises(SettingsError, match="--labels lacks 'w3', the completion of some row; name"):
        evaluate(path, [data], labels=["w0", "w1", "w2"], device="cpu")
    with pytest.raises(SettingsError, match="--labels without effect"):
        evaluate(path, [write_rows(tmp_path / "t.jsonl", task_rows("text"))], labels=["w0"], device="cpu")
    with pytest.raises(DataError, match="one kind of row at a time"):
        evaluate(path, [data, tmp_path / "t.jsonl"], device="cpu")


def test_masked_models_have_a_repeatable_loss(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m", "bert")
    data = write_rows(tmp_path / "t.jsonl", task_rows("text"))
    first, second = (evaluate(path, [data], device="cpu") for _ in range(2))
    assert first == second


def test_a_token_beyond_the_embeddings_is_named_with_its_row(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    small = transformers.AutoModelForCausalLM.from_pretrained(model)
    small.resize_token_embeddings(20)
    small.save_pretrained(model)
    last = make_tokenizer().convert_ids_to_tokens(30)
    plain = [{"prompt": f"w{i}", "completion": "w2"} for i in (1, 2)]
    rows = write_rows(tmp_path / "rows.jsonl", [*plain, {"prompt": f"w1 {last}", "completion": "w2"}])
    with pytest.raises(DataError, match=r"rows.jsonl:3: the tokenizer gives id 30, the model has 20 embeddings"):
        evaluate(model, rows, device="cpu")


def test_one_label_ranks_nothing(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [row | {"completion": "w2"} for row in task_rows(count=6)])
    found = evaluate(model, rows, device="cpu")
    assert found.accuracy is None
    assert found.loss is not None
