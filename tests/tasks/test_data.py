"""What rows become, shown before training; and rows that once went wrong, through the commands."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from conftest import Result, make_tokenizer, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, TrainSettings, analyze, evaluate, preview, train
from sculptor.errors import OutputError, SettingsError, Stopped

COVERS = ["sculptor.report.data"]
TEMPLATE = "{% for m in messages %}{{ m.content }} <end> {% endfor %}"
TALK = {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}


def test_rows_are_shown_with_what_carries_loss(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    long = {"prompt": " ".join(["w1"] * 30), "completion": "w2"}
    rows = [
        *task_rows(count=4),
        long,
        {"prompt": "w1", "completion": " ".join(["w3"] * 30)},
        {"text": " ".join(["w4"] * 40)},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    talk = write_rows(tmp_path / "talk.jsonl", [TALK])
    found = preview(model, [file, talk], max_length=16, chat_template=str(tmp_path / "template.jinja"), rows=8)
    assert (found.num_rows, found.num_dropped, found.num_cut, found.num_split) == (8, 1, 1, 1)
    assert found.rows[0].examples[0].parts[-1][1]
    assert found.rows[7].examples[0].parts == (("w1 w2 <end>", False), (" w3 <end>", True))
    result = cli("data", file, "--model", model, "--max-length", 16, "--rows", 7)
    assert result.code == 0
    assert "»" in result.out
    assert "dropped" in result.out
    assert max(map(len, result.out.splitlines())) <= 100
    assert cli("data", file, "--model", model, "--json").json["num_rows"] == 7
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    (model / "generation_config.json").unlink(missing_ok=True)
    told = cli("data", talk, "--model", model, "--chat-template", tmp_path / "template.jinja").out
    assert "the chat template ends turns with <end>, where generation does not stop" in " ".join(told.split())
    wrong = cli("data", file, "--model", model, "--chat-template", tmp_path / "template.jinja")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)


def test_the_space_that_a_word_begins_with_is_shown(tmp_path: Path) -> None:
    """SentencePiece drops it from what is decoded alone, and tidying up others: ` yes` and `yes` are other tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = save_checkpoint(tmp_path / "model")
    letters = ["<unk>", "<end>", "<pad>", "\u2581", *"abcdefghijklmnopqrstuvwxyz'"]
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    ).save_pretrained(model)
    said = [" yes", "yes", " do n't"]
    found = preview(model, [{"prompt": "is it", "completion": text} for text in said])
    assert [row.examples[0].parts for row in found.rows] == [
        (("is it", False), (f"{text}<end>", True)) for text in said
    ]


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_a_pad_token_beyond_the_embeddings(tmp_path: Path, family: str) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    kind = "text" if family == "bert" else "pairs"
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(kind, 7))
    expected = evaluate(model, [rows], device="cpu", batch_size=7).loss
    tokenizer = make_tokenizer(wrapped=family == "bert")
    tokenizer.add_special_tokens({"pad_token": "<a new one>"})
    tokenizer.add_tokens([f"more{i}" for i in range(40)])
    tokenizer.save_pretrained(model)
    assert len(tokenizer) > 64
    assert evaluate(model, [rows], device="cpu", batch_size=7).loss == pytest.approx(expected, rel=1e-6)


def stopped_after(steps: int) -> Callable[[], int | None]:
    count = [0]

    def stop() -> int | None:
        count[0] += 1
        return 15 if count[0] >= steps else None

    return stop


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model")
    analyze(tmp_path / "model", tmp_path / "subspaces", AnalyzeSettings(preserve=0.5, device="cpu"))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    write_rows(tmp_path / "rows.jsonl", [TALK] * 12)
    return tmp_path


def run(place: Path, **more: object) -> object:
    settings = TrainSettings(
        max_steps=4, batch_size=4, save_every=1, device="cpu", chat_template=str(place / "template.jinja")
    )
    return train(place / "model", place / "subspaces", [place / "rows.jsonl"], place / "out", settings, **more)  # type: ignore[arg-type]


def test_a_resume_says_what_differs(place: Path) -> None:
    with pytest.raises(Stopped):
        run(place, stop=stopped_after(2))
    (place / "template.jinja").write_text("w9 " + TEMPLATE)  # as one that prints the date
    with pytest.raises(OutputError, match="one that prints the date"):
        run(place, resume=True)
    (place / "template.jinja").write_text(TEMPLATE)
    write_rows(place / "rows.jsonl", [TALK] * 13)
    with pytest.raises(OutputError, match="the data files hold other rows now"):
        run(place, resume=True)
    write_rows(place / "rows.jsonl", [TALK] * 12)
    for change, name in (
        (edit_embedding, "model.embed_tokens.weight"),
        (edit_norm, "model.norm.weight"),
        (edit_eps, "config.json"),
    ):
        kept = Path(shutil.copytree(place / "model", place / "kept"))
        change(place / "model")
        with pytest.raises(OutputError, match=f"{name} changed since"):
            run(place, resume=True)
        shutil.rmtree(place / "model")
        kept.rename(place / "model")
    run(place, resume=True)


def edit_tensor(model: Path, name: str) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def edit_embedding(model: Path) -> None:
    edit_tensor(model, "model.embed_tokens.weight")


def edit_norm(model: Path) -> None:
    edit_tensor(model, "model.norm.weight")


def edit_eps(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def test_a_template_without_use_is_refused(place: Path) -> None:
    write_rows(place / "rows.jsonl", task_rows())
    with pytest.raises(SettingsError, match="--chat-template without effect"):
        run(place)


def test_masked_loss_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", "bert")
    config = json.loads((model / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config | still))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text", 16))
    losses = [evaluate(model, [rows], device="cpu", batch_size=size).loss for size in (16, 4, 1)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    analyze(model, tmp_path / "subspaces", AnalyzeSettings(preserve=0.5, device="cpu"))
    first = []
    for size in (16, 4, 2):
        settings = TrainSettings(max_steps=1, batch_size=16, micro_batch_size=size, device="cpu", learning_rate=1e-9)
        first.append(train(model, tmp_path / "subspaces", [rows], tmp_path / f"{size}", settings).loop.first_loss)
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)


def test_dropout_is_that_of_a_split(tmp_path: Path) -> None:
    """What docs/data.md promises: with one seed and one split the same result, streamed or not, and masks that follow the rows."""
    model = save_checkpoint(tmp_path / "model", "bert")
    assert json.loads((model / "config.json").read_text())["hidden_dropout_prob"] == 0.1
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text", 16))
    analyze(model, tmp_path / "subspaces", AnalyzeSettings(preserve=0.5, device="cpu"))
    losses = {}
    for name, size, offload in (
        ("a", 16, "none"),
        ("b", 16, "cpu"),
        ("c", 4, "none"),
        ("d", 4, "disk"),
        ("e", 4, "none"),
    ):
        settings = TrainSettings(
            max_steps=3, batch_size=16, micro_batch_size=size, device="cpu", learning_rate=1e-3, offload=offload
        )
        loop = train(model, tmp_path / "subspaces", [rows], tmp_path / name, settings).loop
        losses[name] = (loop.first_loss, loop.last_loss)
    assert losses["b"] == pytest.approx(losses["a"], rel=1e-5)
    assert losses["d"] == pytest.approx(losses["c"], rel=1e-5)
    assert losses["e"] == losses["c"]
    assert losses["a"] == pytest.approx(losses["c"], rel=0.1), "the same rows and masks, under other dropout"
