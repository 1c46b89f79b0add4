"""`train --task sequence-classification`: a free head, a protected body, and the numbers that transformers has."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SMALL, WORDS, Result, make_tokenizer, save_checkpoint, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, TrainSettings, analyze, continual, estimate, evaluate, train, verify
from sculptor.checkpoint.heads import find_new_head
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.labelled import class_names
from sculptor.data.row_types import LabelledRow
from sculptor.errors import CheckpointError, DataError, SculptorError, SettingsError
from sculptor.report.evaluate import evaluate_text
from sculptor.report.verify import verify_text
from sculptor.tasks.data import preview

COVERS = ["sculptor.checkpoint.heads", "sculptor.data.labelled", "sculptor.tasks.new_head"]
SETTINGS = TrainSettings(
    task="sequence-classification", epochs=6, batch_size=6, relative_rate=0.05, device="cpu", micro_batch_size=3
)
NAMES = ("calm", "loud", "odd one")


def labelled_rows(pairs: bool = False, count: int = 24) -> list[dict[str, Any]]:
    """The class follows from one word; lengths differ."""
    rows = []
    for i in range(count):
        text = " ".join([*WORDS[i % 5 : i % 5 + 2 + i % 4], WORDS[20 + i % 3]])
        rows.append(
            {"text": text, "label": NAMES[i % 3]} | ({"text_pair": " ".join(WORDS[: 1 + i % 3])} if pairs else {})
        )
    return rows


def save_bert(path: Path, cls: Any) -> Path:
    """An encoder whose tokenizer tells the texts of a pair apart."""
    from tokenizers.processors import TemplateProcessing

    torch.manual_seed(0)
    model = cls(transformers.BertConfig(**SMALL, pad_token_id=1, initializer_range=0.2))
    model.save_pretrained(path)
    tokenizer = make_tokenizer(wrapped=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<cls> $A <sep>", "<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 44), ("<sep>", 45)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, tuned to classify."""
    path = tmp_path_factory.mktemp("classes")
    write_rows(path / "llama.jsonl", labelled_rows())
    save_checkpoint(path / "llama", "llama-tied")
    _tune(path, "llama")
    return path


@pytest.fixture(scope="module")
def pairs(made: Path) -> Path:
    """A masked language model beside it, tuned to classify pairs."""
    write_rows(made / "bert.jsonl", labelled_rows(pairs=True))
    save_bert(made / "bert", transformers.BertForMaskedLM)
    _tune(made, "bert")
    return made


def _tune(path: Path, name: str) -> None:
    analyze(
        path / name,
        path / f"{name}-archive",
        AnalyzeSettings(basis="weights", preserve=0.5, samples=False, device="cpu"),
    )
    train(path / name, path / f"{name}-archive", [path / f"{name}.jsonl"], path / f"{name}-tuned", SETTINGS)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@torch.no_grad()
def plain_loop(path: Path, rows: list[dict[str, Any]], size: int) -> tuple[float, float]:
    """Loss per row and accuracy as anybody computes them with transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert tuple(model.config.id2label.values()) == NAMES
    total = right = 0.0
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [[row[key] for row in part] for key in ("text", "text_pair") if key in part[0]]
        labels = torch.tensor([model.config.label2id[row["label"]] for row in part])
        found = model.eval()(**tokenizer(*texts, padding=True, return_tensors="pt"), labels=labels)
        total += float(found.loss) * len(part)
        right += float((found.logits.argmax(dim=1) == labels).sum())
    return total / len(rows), right / len(rows)


@pytest.mark.parametrize(("name", "fresh"), [
    ("llama", ("score.weight",)),
    pytest.param(
        "bert", ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"),
        marks=pytest.mark.slow,
    ),
])  # fmt: skip
def test_a_new_head_is_learned_and_the_body_verifies(
    request: pytest.FixtureRequest, name: str, fresh: tuple[str, ...]
) -> None:
    made = request.getfixturevalue("made" if name == "llama" else "pairs")
    base, tuned, rows = made / name, made / f"{name}-tuned", made / f"{name}.jsonl"
    for size in (1, 2, 6):
        loss, accuracy = plain_loop(tuned, labelled_rows(name == "bert"), size)
        found = evaluate(tuned, [rows], batch_size=size, device="cpu")
        assert found.loss == pytest.approx(loss, abs=1e-5)
        assert (found.accuracy, found.labels, found.num_rows) == (accuracy, NAMES, 24)
    assert loss < 1.0, "better than chance, which is 1.1"
    assert "accuracy (3 classes)" in evaluate_text(found)
    assert "tokens" not in evaluate_text(found)
    first = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first == pytest.approx(1.1, abs=0.5), "nats a row"
    proof = verify(base, tuned, made / f"{name}-archive", device="cpu")
    assert (proof.passed, proof.new_head, proof.also_trained) == (True, fresh, tuple(sorted(fresh)))
    named = ", ".join(map(repr, proof.classes))
    assert f"a new head, which is free: {', '.join(fresh)}; its classes, in order: {named}\n" in verify_text(proof)
    old, new = tensors(base), tensors(tuned)
    assert new.keys() - old.keys() == set(fresh)
    gone = {key for key in old if key.startswith(("cls.", "lm_head"))}
    assert old.keys() - new.keys() == gone
    record = json.loads((tuned / "sculptor.json").read_text())
    assert (record["base"]["name"], record["settings"]["task"]) == (name, "sequence-classification")
    assert not (made / f"{name}-tuned.partial").exists()


@pytest.mark.slow
def test_what_else_changed_does_not_verify(pairs: Path, tmp_path: Path) -> None:
    def tampered(change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None, **config: Any) -> Path:
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(pairs / "llama-tuned", tmp_path / "other")
        values = tensors(tmp_path / "other")
        change(values)
        save_file(values, tmp_path / "other" / "model.safetensors", {"format": "pt"})
        said = json.loads((tmp_path / "other" / "config.json").read_text()) | config
        (tmp_path / "other" / "config.json").write_text(json.dumps(said))
        return tmp_path / "other"

    def passes(other: Path) -> bool:
        return verify(pairs / "llama", other, pairs / "llama-archive", device="cpu").passed

    assert passes(tampered())
    assert passes(tampered(lambda values: values["score.weight"].mul_(2))), "the head is free"
    assert not passes(tampered(lambda values: values["model.norm.weight"].mul_(2)))
    assert not passes(tampered(rms_norm_eps=0.1))
    assert not passes(tampered(problem_type="regression"))
    assert not passes(tampered(lambda values: values["model.layers.0.mlp.up_proj.weight"].add_(0.1)))
    with pytest.raises(SculptorError, match="tensors differ"):  # a sequence would end before each of these words
        passes(tampered(pad_token_id=9))
    with pytest.raises(CheckpointError, match=r"score\.weight has 1 NaN"):
        passes(tampered(lambda values: values["score.weight"][0, 0].fill_(torch.nan)))
    with pytest.raises(SculptorError, match="2 added, first extra"):
        passes(tampered(lambda values: values.update(extra=torch.ones(2))))
    odd = [
        {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
        for names in ((*NAMES, "more"), (*NAMES[:-1], ""), (*NAMES[:-1], NAMES[0]))
    ]
    for config in odd:  # a head of other classes than the tensors are of, or of classes that nobody can tell
        with pytest.raises(SculptorError, match="tensors differ"):
            passes(tampered(**config))
    narrow = lambda values: values.update({"score.weight": values["score.weight"][:, 1:].contiguous()})  # noqa: E731
    with pytest.raises(SculptorError, match="tensors differ"):
        passes(tampered(narrow))
    assert find_new_head(*map(open_checkpoint, (pairs / "llama", pairs / "llama"))) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_streamed_is_resident(pairs: Path, tmp_path: Path, name: str) -> None:
    settings = replace(SETTINGS, epochs=1)
    for offload in ("none", "cpu"):
        train(
            pairs / name, pairs / f"{name}-archive", [pairs / f"{name}.jsonl"], tmp_path / offload,
            replace(settings, offload=offload),
        )  # fmt: skip
    resident, streamed = tensors(tmp_path / "none"), tensors(tmp_path / "cpu")
    for tensor, value in resident.items():
        assert torch.equal(value, streamed[tensor]), tensor


@pytest.mark.slow
def test_a_model_with_a_head_goes_on(pairs: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    tuned, rows = pairs / "bert-tuned", pairs / "bert.jsonl"
    said = cli(
        "train", tuned, "--subspaces", tuned / "subspaces", "--data", rows, "-o", tmp_path / "out", "--max-steps", 2,
        "--device", "cpu", "--eval-data", rows,
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "classifier.weight" in said.out
    assert verify(tuned, tmp_path / "out", tuned / "subspaces", device="cpu").passed
    whole = verify(pairs / "bert", tmp_path / "out", pairs / "bert-archive", device="cpu")
    assert (whole.passed, whole.num_merges, "classifier.bias" in whole.also_trained) == (True, 2, True)
    again = evaluate(tmp_path / "out", [rows], watch=[rows], device="cpu")
    assert again.watched[0].loss == pytest.approx(again.loss)
    numbered = [{**row, "label": NAMES.index(row["label"])} for row in labelled_rows(pairs=True)]
    assert evaluate(tmp_path / "out", [numbered], device="cpu").loss == pytest.approx(again.loss)
    with pytest.raises(DataError, match="'label' is 'new'; the classes of the model are 'calm', 'loud', 'odd one'"):
        train(tuned, tuned / "subspaces", [[{"text": "w1", "label": "new"}]], tmp_path / "no", SETTINGS)
    report = preview(tuned, [rows])
    assert report.rows[0].examples[0].target == "calm"
    assert estimate(tuned, subspaces=tuned / "subspaces", data=[rows]).data.num_rows == 24
    path = tmp_path / "archive"
    analyze(tuned, path, AnalyzeSettings(basis="curvature", device="cpu", calibration_tokens=200), data=[rows])
    with pytest.raises(DataError, match="no 'label'"):
        analyze(
            tuned, path, AnalyzeSettings(basis="curvature", device="cpu"), data=[[{"text": "w1 w2"}]], overwrite=True
        )


@pytest.mark.slow
def test_without_an_archive_the_model_as_given_is_analyzed(
    pairs: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """Of an encoder that has no head at all, what its layers read is protected."""
    base, text = (
        save_bert(tmp_path / "bare", transformers.BertModel),
        write_rows(tmp_path / "text.jsonl", [{"text": " ".join(WORDS[i : i + 6])} for i in range(20)]),
    )
    arguments = ("train", base, "--task", "sequence-classification", "--data", pairs / "bert.jsonl", "--max-steps", 2,
        "--device", "cpu", "-o", tmp_path / "out")  # fmt: skip
    refused = cli(*arguments)
    assert (refused.code, "give --protect-data" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "out.partial").exists()
    said = cli(*arguments, "--protect-data", text)
    assert said.code == 0, said.err
    assert "a new head, classifier.weight, classifier.bias, for 3 classes: 'calm', 'loud', 'odd one'" in said.err
    assert verify(base, tmp_path / "out", tmp_path / "out" / "analyzed", device="cpu").passed
    assert plain_loop(tmp_path / "out", labelled_rows(pairs=True), 6)[0] == pytest.approx(
        evaluate(tmp_path / "out", [pairs / "bert.jsonl"], device="cpu").loss, abs=1e-5
    )


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"add_tokens": ("<a>",)}, {}, "--add-tokens: for language models"),
    ({"kl_weight": 0.1}, {}, "--kl-weight: for language models"),
    ({"max_harm": 0.1}, {}, "--max-harm: for language models"),
    ({}, {"replay": ["self"]}, "--replay: for language models"),
    ({}, {"data": [[{"text": "w1", "label": "a"}]]}, "a classifier needs two or more"),
    ({}, {"data": [[{"text": "w1", "label": 0.5}]]}, "'label' is 0.5, a score; sculptor trains classes"),
    ({}, {"data": [[{"text": " ", "label": "a"}]]}, "a text is ' '; expected words"),
    ({}, {"data": [[{"text": "w1"}]]}, "no 'label'; expected 'text' and 'label'"),
    ({}, {"data": [[{"premise": "a", "hypothesis": "b", "label": 1}]]}, "--columns text=premise,text_pair=hypothesis"),
    ({}, {"eval_data": [[{"text": "w1", "label": "x"}]]}, "'label' is 'x'; the classes of the model are"),
    ({"chat_template": "x"}, {}, "chat-template"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "given", "said"), REFUSED)
def test_what_cannot_work_is_refused_and_leaves_nothing(
    made: Path, tmp_path: Path, settings: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    data = given.pop("data", [made / "llama.jsonl"])
    with pytest.raises(SculptorError, match=said.replace("(", r"\(")):
        train(made / "llama", made / "llama-archive", data, tmp_path / "out", replace(SETTINGS, **settings), **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_models_that_are_no_classifiers_of_rows(pairs: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "t5", "t5")
    with pytest.raises(SettingsError, match="is an encoder-decoder"):
        train(tmp_path / "t5", None, [pairs / "llama.jsonl"], tmp_path / "out", SETTINGS)
    with pytest.raises(SettingsError, match="says no text; it has a classifier's head"):
        train(
            pairs / "bert-tuned", pairs / "bert-tuned" / "subspaces", [pairs / "bert.jsonl"], tmp_path / "out",
            replace(SETTINGS, task="language-modeling"),
        )  # fmt: skip
    for number, (change, said) in enumerate({
        "problem_type": ("multi_label_classification", "gives scores"), "id2label": ({"0": "score"}, "requires `num_labels"),
    }.items()):  # fmt: skip
        shutil.copytree(pairs / "bert-tuned", tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "config.json").read_text()) | {change: said[0]}
        (tmp_path / str(number) / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=said[1]):
            evaluate(tmp_path / str(number), [pairs / "bert.jsonl"], device="cpu")
    with pytest.raises(SettingsError, match="a classifier has classes, and says no text"):
        evaluate(pairs / "bert-tuned", [pairs / "bert.jsonl"], show=1, device="cpu")
    with pytest.raises(SettingsError, match="--tasks: for language models"):
        evaluate(pairs / "bert-tuned", tasks=["piqa"], device="cpu")
    task = '[[tasks]]\nname = "a"\ndata = ["llama.jsonl"]\ntest = ["llama.jsonl"]\n'
    for name, model, section in (
        ("one", "llama", '[train]\ntask = "sequence-classification"\n'),
        ("two", "llama-tuned", ""),
    ):
        (pairs / f"{name}.toml").write_text(f'model = "{model}"\n{section}{task}')
        with pytest.raises(SettingsError, match="a classifier's head has the classes of one task"):
            continual(pairs / f"{name}.toml", tmp_path / "sequence")
    shutil.copytree(pairs / "llama-tuned", tmp_path / "padless")
    config = json.loads((tmp_path / "padless" / "config.json").read_text()) | {"pad_token_id": None}
    (tmp_path / "padless" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='no "pad_token_id"'):
        evaluate(tmp_path / "padless", [pairs / "llama.jsonl"], device="cpu")


@pytest.mark.slow
def test_columns_numbers_and_names_of_a_dataset(pairs: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = labelled_rows(pairs=True)
    features = datasets.Features(
        {"a": datasets.Value("string"), "b": datasets.Value("string"), "gold": datasets.ClassLabel(names=list(NAMES))}
    )
    given = [{"a": row["text"], "b": row["text_pair"], "gold": row["label"]} for row in rows]
    dataset = datasets.Dataset.from_list(given, features=features)
    found = evaluate(pairs / "bert-tuned", dataset, columns="text=a,text_pair=b,label=gold", device="cpu")
    assert found.loss == pytest.approx(evaluate(pairs / "bert-tuned", [pairs / "bert.jsonl"], device="cpu").loss)


def test_labels_are_read_alike_in_all_rows() -> None:
    """Numbers of classes count where no class is called by a number: rows 0 to 4 would fall on classes 1 to 5 otherwise."""
    from sculptor.data.labelled import Classes, labelled

    def read(label: Any, *names: str) -> int | None:
        return labelled({"text": "w1", "label": label}, "rows:1", Classes(names)).index

    assert [read(label, "no", "yes") for label in (0, "1", "yes")] == [0, 1, 1]
    assert [read(label, *"12345") for label in (1, "5")] == [0, 4]
    for names in ("12345", ("-1", "0", "1"), ("1", "2", "other")):
        with pytest.raises(DataError, match=r"'label' is .*the classes of the model are"):
            [read(label, *names) for label in (0, 2, 3)]


def test_what_only_looks_like_a_number_is_a_name() -> None:
    rows = [LabelledRow(f"rows:{i}", "w1", None, name, None) for i, name in enumerate(["\u00b2", "3", "10"])]
    assert class_names(rows) == ("10", "3", "\u00b2")


def test_names_that_are_numbers_are_names() -> None:
    """As a table of floats has them: 1.0 is the class of that name, and not the second."""
    from sculptor.data.labelled import Classes, labelled

    for names in (("1.0", "2.0", "3.0"), ("1", "2", "3")):
        read = [labelled({"text": "w1", "label": label}, "a:1", Classes(names)).index for label in (1, 2.0)]
        assert read == [0, 1]
        assert labelled({"text": "w1", "label": names[2]}, "a:1", Classes(names)).index == 2
        with pytest.raises(DataError, match="'label' is '0'"):
            labelled({"text": "w1", "label": 0}, "a:1", Classes(names))


def test_rows_that_can_be_read_once_are_those_that_are_trained(made: Path, tmp_path: Path) -> None:
    """Their classes are looked at first."""
    rows = labelled_rows()
    settings = replace(SETTINGS, epochs=None, max_steps=1, max_rows=12)
    digests = []
    for name, given in (("list", rows), ("once", iter(rows)), ("later", rows[12:])):
        train(made / "llama", made / "llama-archive", given, tmp_path / name, settings)
        digests.append(json.loads((tmp_path / name / "sculptor.json").read_text())["data"]["rows_sha256"])
    assert digests[0] == digests[1] != digests[2]
