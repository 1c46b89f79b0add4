"""docs/trainers.md: every example runs, and what it leaves verifies."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, slowly, task_rows, write_rows
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sculptor
import sculptor.tasks.callback as callback_module
from sculptor.data.collated import batch_examples
from sculptor.progress import silent

COVERS = ["sculptor.data.collated", "sculptor.tasks.callback", "sculptor.jobs.same_model", "sculptor.training.saved"]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "trainers.md"


def example(title: str) -> str:
    """The code below a heading."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    found = re.search(r"^```python\n(.*?)^```", rest, re.M | re.S)
    assert found is not None, title
    return found[1]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, an archive of its weights and one with moments."""
    path = tmp_path_factory.mktemp("bases")
    save_checkpoint(path / "model")
    write_rows(path / "task.jsonl", task_rows())
    for name, options in {"weights": {"preserve": 0.5}, "moments": {"data": (str(path / "task.jsonl"),)}}.items():
        sculptor.analyze(path / "model", path / name, sculptor.AnalyzeSettings(device="cpu", **options))
    return {name: path / name for name in ("model", "task.jsonl", "weights", "moments")}


@pytest.fixture
def place(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(bases["model"])
    (tmp_path / "subspaces").symlink_to(bases["moments"])
    return tmp_path


IMPORTS = "from datasets import Dataset\nfrom transformers import AutoModelForCausalLM\nimport sculptor, torch\n"
TITLES = {
    "Trainer": "by-trainer",
    "SFTTrainer": "by-sft",
    "DPOTrainer": "by-dpo",
    "GRPOTrainer": "by-grpo",
    "A plain PyTorch loop": "by-loop",
    "accelerate": "by-accelerate",
    "torch.compile": "by-compile",
}


SLOW = ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "torch.compile")


@pytest.mark.parametrize(
    "title", [pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in TITLES]
)
def test_examples_run_and_verify(place: Path, title: str) -> None:
    pytest.importorskip("datasets")
    if title.endswith("OTrainer") or title == "SFTTrainer":
        pytest.importorskip("trl")
    namespace: dict[str, Any] = {}
    exec(IMPORTS + example(title), namespace)
    found = sculptor.verify("model", TITLES[title], "subspaces", device="cpu")
    assert found.passed
    assert found.num_changed
    if "trainer" in namespace:
        assert namespace["trainer"].state.log_history[-1]["sculptor_leak"] == found.leak
        written = namespace["trainer"].callback_handler.callbacks
        (callback,) = [each for each in written if isinstance(each, sculptor.SculptorCallback)]
        harm = sculptor.harm(AutoModelForCausalLM.from_pretrained(TITLES[title]), "subspaces")
        assert callback.report.loop.harm.nats == pytest.approx(harm.nats, rel=1e-3, abs=1e-6)
        again = sculptor.Archive(place / TITLES[title] / "subspaces")
        again.check_base(sculptor.checkpoint.reader.open_checkpoint(place / TITLES[title]))
    if title == "DPOTrainer":
        trainer = namespace["trainer"]
        assert not any("parametrizations" in name for name, _ in trainer.ref_model.named_parameters())
        base = AutoModelForCausalLM.from_pretrained("model")
        for name, value in trainer.ref_model.named_parameters():
            assert torch.equal(value, base.get_parameter(name)), name


class Best:
    """The Trainer on a checkpoint that lies at hand, saving every other step."""

    def __init__(self, place: Path, **arguments: Any) -> None:
        self.given: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, **arguments}
        self.place = place

    def train(self, output: str, resume: str | None = None, archive: str = "subspaces", **options: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained("model")
        sculptor.protect(model, archive)
        arguments = TrainingArguments(
            str(self.place / "run"), use_cpu=True, report_to="none", learning_rate=1e-2, logging_steps=1, disable_tqdm=True,
            eval_strategy="steps", per_device_train_batch_size=2, gradient_accumulation_steps=2, **self.given,
        )  # fmt: skip
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(4, 40).view(9, 4).tolist()]
        callback = sculptor.SculptorCallback("model", options.pop("named", archive), output, **options)
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback


def weights(path: Path | str) -> bytes:
    return (Path(path) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_saves_resume_and_the_best_model(place: Path, bases: dict[str, Path]) -> None:
    told: list[str] = []
    trainer, callback = Best(place).train("whole", notice=told.append)
    assert len(told) == 2, "at the last step the output is what would lie there"
    assert callback.report.loop.steps == 4
    assert [round(entry["sculptor_leak"], 9) for entry in trainer.state.log_history if "sculptor_leak" in entry]
    record = json.loads((place / "whole" / "sculptor.json").read_text())
    assert (record["command"], record["trainer"]["max_steps"]) == ("trainer", 4)
    assert (record["trainer"]["lr_scheduler_type"], record["result"]["tokens"]) == ("linear", None)
    assert "num_train_epochs" not in record["trainer"], "max_steps was asked for"
    last = json.loads((place / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["sculptor_leak"] == callback.verification.leak
    assert not (place / "run" / "checkpoint-4" / "merged").exists()

    # What the Trainer saved in between is the model as it was, and so is what lies beside it.
    between = AutoModelForCausalLM.from_pretrained("run/checkpoint-2")
    beside = AutoModelForCausalLM.from_pretrained("run/checkpoint-2/merged")
    base = AutoModelForCausalLM.from_pretrained("model")
    ids = torch.arange(4, 24).view(2, 10)
    expected = beside(input_ids=ids).logits
    torch.testing.assert_close(between(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert float((base(input_ids=ids).logits - expected).abs().max()) > 1e-3
    assert sculptor.verify("model", "run/checkpoint-2/merged", "subspaces", device="cpu").passed

    # Taken up after two steps, bit for bit; not with another archive.
    Best(place).train("resumed", "run/checkpoint-2")
    assert weights("resumed") == weights("whole")
    sculptor.analyze("model", "other", sculptor.AnalyzeSettings(data=("self",), calibration_tokens=300, device="cpu"))
    with pytest.raises(sculptor.SculptorError, match=r"another archive or model|size mismatch"):
        Best(place).train("wrong", "run/checkpoint-2", archive="other")
    assert not (place / "wrong").exists()

    # The worst counts as best here, so that it is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer, callback = Best(place, **best).train("best", at_save=False)
    assert trainer.state.best_global_step == 2
    assert weights("best") == weights("run/checkpoint-2/merged")
    assert callback.report.loop.best_step == 2


@pytest.mark.slow
def test_what_could_not_be_written_is_refused_before_a_step(place: Path, bases: dict[str, Path]) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(sculptor.SculptorError, match=match):
            Best(place).train("out", **options)
        assert not list(place.glob("out*"))

    refused("protected with another archive", named=bases["weights"])
    refused("--memory-rows without effect", archive=bases["weights"], memory_rows=4)
    refused("--carry accumulate", carry="accumulate")
    (place / "there").mkdir()
    with pytest.raises(sculptor.SculptorError, match="exists already"):
        Best(place).train("there")
    with pytest.raises(sculptor.SculptorError, match="lies in the input"):
        Best(bases["model"]).train("out", archive=str(bases["moments"]))
    model = AutoModelForCausalLM.from_pretrained("model")
    callback = sculptor.SculptorCallback("model", "subspaces", "out")
    arguments = TrainingArguments("run", use_cpu=True, report_to="none", max_steps=1)
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    with pytest.raises(sculptor.SculptorError, match="not protected"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    sculptor.protect(model, "subspaces")
    with pytest.raises(sculptor.SculptorError, match="no coordinates in what is loaded"):
        model.load_state_dict(AutoModelForCausalLM.from_pretrained("model").state_dict())
    model.load_state_dict(model.state_dict())  # every key has its place
    norm = model.model.norm
    with torch.no_grad():
        norm.weight.mul_(1.5)
    with pytest.raises(sculptor.SculptorError, match=r"model.norm.weight is frozen, and not as in"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    with torch.no_grad():
        norm.weight.div_(1.5)
    norm.scale = torch.nn.Parameter(torch.ones(3))  # as an adapter's
    with pytest.raises(sculptor.SculptorError, match=r"model.norm.scale is trained, and .* has no tensor for it"):
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert not list(place.glob("out*"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("run/checkpoint-4", "run/checkpoint-4 is the trainer's"),
        ("run/checkpoint-4/final", "run/checkpoint-4 is the trainer's"),
        ("run", "is or holds the trainer's own directory"),
        (".", "is or holds the trainer's own directory"),
        ("mine", "so --overwrite does not touch it"),
        ("left", "left.partial: is in the way and not ours"),
        ("new.partial", "names that end in .partial"),
        ("model/new", "lies in the input"),
    ],
)
def test_places_that_would_be_refused_at_the_end_are_refused_at_the_beginning(
    tmp_path: Path, output: str, message: str
) -> None:
    for folder in ("mine", "left.partial", "model", "run"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "precious").touch()
    callback = sculptor.SculptorCallback(tmp_path / "model", tmp_path / "archive", tmp_path / output, overwrite=True)
    with pytest.raises(sculptor.SculptorError, match=message):
        callback.on_train_begin(TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none"), None, None)


def _louder(module: Any, inputs: Any, outputs: Any) -> Any:
    return outputs * 1.3


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Any], object], str]] = {
    "setting": ({"rms_norm_eps": 1e-2}, lambda model: None, r"rms_norm_eps was 1e-06, is 0.01; change it there"),
    "hook": ({}, lambda model: model.model.norm.register_forward_hook(_louder), "predicts something else than .*model, by"),
    "buffer": ({}, lambda model: model.model.rotary_emb.inv_freq.mul_(1.1), "model.rotary_emb.inv_freq: a buffer that is not"),
    "module": ({}, lambda model: setattr(model.model.norm, "variance_epsilon", 1.0), "predicts something else than .*model"),
}  # fmt: skip


@pytest.mark.parametrize("change", ["setting", "hook", *slowly("buffer", "module")])
def test_what_trains_is_what_is_written(place: Path, bases: dict[str, Path], change: str) -> None:
    """A model that computes something else than its checkpoint is refused before a step."""
    options, meddle, message = CHANGES[change]
    model = AutoModelForCausalLM.from_pretrained("model", **options)
    meddle(model)
    sculptor.protect(model, bases["weights"])
    arguments = TrainingArguments("run", use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True)
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    callback = sculptor.SculptorCallback("model", bases["weights"], "out")
    with pytest.raises(sculptor.SculptorError, match=message):
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert not list(place.glob("out*"))


@pytest.mark.slow
def test_what_is_changed_while_it_trains_is_not_written(place: Path, bases: dict[str, Path]) -> None:
    class Meddling(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 1:
                given["model"].model.norm.register_forward_hook(_louder)

    model = AutoModelForCausalLM.from_pretrained("model")
    model.config.attention_dropout = 0.1  # of training alone
    sculptor.protect(model, bases["weights"])
    arguments = TrainingArguments(
        "run", use_cpu=True, report_to="none", max_steps=2, save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    callbacks = [sculptor.SculptorCallback("model", bases["weights"], "out"), Meddling()]
    with pytest.raises(sculptor.SculptorError, match="predicts something else than what is written of it"):
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    assert not list(place.glob("out*"))


@pytest.mark.parametrize(("quiet", "given"), [(False, False), (True, False), (False, True)])
def test_the_callback_shows_what_it_does_as_the_trainer_does(
    place: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, quiet: bool, given: bool
) -> None:
    """After the last step it writes, measures and verifies: minutes that are not silent, unless the trainer is, or one says how."""
    shown: dict[str, list[str]] = {"ours": [], "given": []}

    def showing(to: str) -> Any:
        def bar(*, total: int, desc: str, unit: str, initial: int = 0) -> Any:
            shown[to].append(desc)
            return silent(total=total, desc=desc, unit=unit, initial=initial)

        return bar

    monkeypatch.setattr(callback_module, "bars", showing("ours"))
    options = {"progress": showing("given")} if given else {}
    model = AutoModelForCausalLM.from_pretrained("model")
    sculptor.protect(model, bases["weights"])
    arguments = TrainingArguments(
        "run", use_cpu=True, report_to="none", max_steps=1, save_strategy="no", disable_tqdm=quiet
    )
    callback = sculptor.SculptorCallback("model", bases["weights"], "out", **options)
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    there = "given" if given else "ours"
    assert shown.pop("given" if there == "ours" else "ours") == []
    assert ("verify" in shown[there]) is ("write" in shown[there]) is (given or not quiet)


def test_rows_of_other_collators() -> None:
    ids, mask = torch.tensor([[4, 5, 6, 1], [4, 9, 9, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    (found,) = batch_examples(
        {"input_ids": ids, "attention_mask": mask, "completion_mask": torch.tensor([[0, 0, 1, 0]] * 2)}
    )
    assert (found.input_ids, found.labels) == ((4, 5, 6), (-100, -100, 6))  # of a preference the chosen answer
    packed = {"input_ids": ids[1:], "labels": ids[1:], "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert [each.input_ids for each in batch_examples(packed)] == [(4, 9), (9, 9)]
    for batch, match in (
        ([{"prompt": "w1"}], "no input_ids"),
        ({"input_ids": ids}, "neither labels"),
        ({"input_ids": ids, "labels": ids + 1}, "not the tokens themselves"),
    ):
        with pytest.raises(sculptor.SculptorError, match=match):
            batch_examples(batch)


def test_a_tokenizer_that_is_not_the_base_s_is_refused(place: Path, bases: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    told: list[str] = []

    def trainer(tokenizer: Any, output: str) -> Trainer:
        model = AutoModelForCausalLM.from_pretrained("model")
        sculptor.protect(model, "subspaces")
        callback = sculptor.SculptorCallback("model", "subspaces", output, carry="keep", notice=told.append)
        arguments = TrainingArguments("run", use_cpu=True, report_to="none", max_steps=1)
        rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
        return Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback])

    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    trainer(tokenizer, "out").train()
    assert any("another chat_template; the output comes with the base's tokenizer" in line for line in told)
    tokenizer.add_tokens(["new"])
    with pytest.raises(sculptor.SculptorError, match="another vocabulary than the base's tokenizer"):
        trainer(tokenizer, "other").train()
    assert not (place / "other").exists()


def test_what_trained_nothing_is_told(place: Path, bases: dict[str, Path]) -> None:
    """An optimizer that was made before the coordinates were there knows nothing of them."""
    told: list[str] = []
    model = AutoModelForCausalLM.from_pretrained("model")
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sculptor.protect(model, "subspaces")
    callback = sculptor.SculptorCallback("model", "subspaces", "out", carry="keep", notice=told.append)
    arguments = TrainingArguments("run", use_cpu=True, report_to="none", max_steps=1)
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback], optimizers=(early, None)).train()
    assert [line for line in told if "no matrix has changed: nothing was trained; make the optimizer after" in line]
    assert not [line for line in told if "verified" in line]
