"""Models of several languages: targets end or begin with the token of theirs, and answers are read as they are generated."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import write_rows

from sculptor import AnalyzeSettings, TrainSettings, analyze, evaluate, train

WORDS = ["world", "sports", "business", "science", "red", "blue", "green", "what", "is", "the", "topic", "of"]
ROWS = [
    {"prompt": "what is the topic of red", "completion": "world sports"},
    {"prompt": "what is blue", "completion": "business"},
    {"prompt": "green of the", "completion": "red blue"},
    {"prompt": "topic", "completion": "science"},
]


def vocabulary() -> list[tuple[str, float]]:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    return (
        pieces
        + [(f"▁{word}", -2.0 - i / 100) for i, word in enumerate(WORDS)]
        + [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz1"]
    )


def make(kind: str, path: Path, **languages: Any) -> tuple[Any, Any]:
    """A small model that has learned the rows by the code of transformers alone."""
    tokenizers: dict[str, Any] = {
        "mbart": transformers.MBartTokenizer,
        "mbart50": transformers.MBart50Tokenizer,
        "nllb": transformers.NllbTokenizer,
    }
    config_class: Any = transformers.M2M100Config if kind == "nllb" else transformers.MBartConfig
    pieces = vocabulary()
    given = (
        {"vocab": {piece: i for i, (piece, _) in enumerate(pieces)}, "merges": []}
        if kind == "nllb"
        else {"vocab": pieces}
    )
    tokenizer = tokenizers[kind](**given, **languages)
    language = tokenizer.convert_tokens_to_ids(tokenizer.tgt_lang or tokenizer.src_lang)
    config = config_class(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, eos_token_id=2, pad_token_id=1, bos_token_id=0, forced_eos_token_id=2,
        decoder_start_token_id=language if kind == "mbart" else 2,
        forced_bos_token_id=None if kind == "mbart" else language,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForSeq2SeqLM.from_config(config)
    inputs, labels = batch(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400 if kind == "nllb" else 150):  # which reads letters here
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def batch(tokenizer: Any) -> tuple[Any, torch.Tensor]:
    inputs = tokenizer([row["prompt"] for row in ROWS], return_tensors="pt", padding=True)
    labels = tokenizer(text_target=[row["completion"] for row in ROWS], return_tensors="pt", padding=True).input_ids
    return inputs, labels.masked_fill(labels == tokenizer.pad_token_id, -100)


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [("mbart", "en_XX", "de_DE"), ("mbart50", "en_XX", "de_DE"), ("nllb", "eng_Latn", "deu_Latn")],
)
def test_it_is_what_transformers_say(kind: str, source: str, target: str, tmp_path: Path) -> None:
    model, tokenizer = make(kind, tmp_path / "model", src_lang=source, tgt_lang=target)
    inputs, labels = batch(tokenizer)
    with torch.no_grad():
        expected = float(model(**inputs, labels=labels).loss)
    made = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=20)
    plain = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made]
    assert plain == [row["completion"] for row in ROWS]
    told: list[str] = []
    labels_to_rank = [row["completion"] for row in ROWS]
    found = evaluate(
        tmp_path / "model", ROWS, labels=labels_to_rank, exact_match=True, show=4, device="cpu", notice=told.append
    )
    assert found.loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (found.accuracy, found.exact_match) == (1.0, 1.0)
    assert [answer.said for answer in found.answers] == plain
    assert not [line for line in told if "language" in line or "generation_config" in line]


def test_a_target_without_a_language_of_its_own_is_told(tmp_path: Path) -> None:
    make("mbart50", tmp_path / "model", src_lang="en_XX")
    write_rows(tmp_path / "rows.jsonl", ROWS * 4)
    analyze(tmp_path / "model", tmp_path / "archive", AnalyzeSettings(preserve=0.5, basis="weights", device="cpu"))
    told: list[str] = []
    settings = TrainSettings(max_steps=1, device="cpu")
    train(
        tmp_path / "model",
        tmp_path / "archive",
        [tmp_path / "rows.jsonl"],
        tmp_path / "out",
        settings,
        notice=told.append,
    )
    assert [line for line in told if "targets in en_XX" in line]
