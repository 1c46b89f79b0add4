"""A directory is read as transformers reads it, in every mode, or refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

import sculptor
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.sameness import differences, tokenizer_differences
from sculptor.checkpoint.writer import write_checkpoint
from sculptor.edits.settings import Interpolate
from sculptor.errors import CheckpointError, SculptorError

COVERS = ["sculptor.checkpoint.configuration"]
ROWS = task_rows(count=6)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def other_weights(path: Path) -> Any:
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))


def newer_single(path: Path) -> None:
    """An index and its shards, then a newer model.safetensors, and no shards."""
    whole = load_file(path / "model.safetensors")
    other_weights(path).save_pretrained(path, max_shard_size="20KB")
    for file in path.glob("model-*.safetensors"):
        file.unlink()
    save_file(whole, path / "model.safetensors", {"format": "pt"})


def newer_single_beside_shards(path: Path) -> None:
    whole = load_file(path / "model.safetensors")
    other_weights(path).save_pretrained(path, max_shard_size="20KB")
    save_file(whole, path / "model.safetensors", {"format": "pt"})


def adapter_beside(path: Path) -> None:
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, path / "adapter_model.safetensors")


def adapter_alone(path: Path) -> None:
    adapter_beside(path)
    (path / "model.safetensors").unlink()
    (path / "config.json").unlink()


def head_apart(path: Path) -> None:
    """The configuration ties them, the files hold two."""
    torch.manual_seed(7)
    edit_weights(path, lambda old: old | {"lm_head.weight": torch.randn_like(old["model.embed_tokens.weight"])})
    edit_config(path, tie_word_embeddings=True)


def head_twice(path: Path) -> None:
    edit_weights(path, lambda old: old | {"lm_head.weight": old["model.embed_tokens.weight"].clone()})
    edit_config(path, tie_word_embeddings=True)


def head_only(path: Path) -> None:
    """Tied, and what is in the files is the head."""
    edit_weights(path, lambda old: {name: value for name, value in old.items() if "embed_tokens" not in name})
    edit_config(path, tie_word_embeddings=True)


def shards_in_a_folder(path: Path) -> None:
    shard(path)
    (path / "weights").mkdir()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        (path / file).rename(path / "weights" / file)
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def shard(path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="20KB")


def shards_outside(path: Path) -> None:
    shard(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    outside = path.parent / "outside"
    outside.mkdir()
    for file in set(index["weight_map"].values()):
        (path / file).rename(outside / file)
    index["weight_map"] = {name: f"../outside/{file}" for name, file in index["weight_map"].items()}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def linked_shards(path: Path) -> None:
    """As the hub's client lays them out: links into its cache."""
    store = path.parent / "models--owner--name" / "blobs"
    store.mkdir(parents=True)
    for i, file in enumerate(sorted(path.iterdir())):
        file.rename(store / str(i))
        file.symlink_to(store / str(i))


def index_without_metadata(path: Path) -> None:
    shard(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index["weight_map"]}))


def native_class_with_code(path: Path) -> None:
    edit_config(path, auto_map={"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"})
    (path / "modeling.py").write_text("raise SystemExit('ran')")


def foreign_class_with_code(path: Path) -> None:
    native_class_with_code(path)
    edit_config(path, model_type="unheard_of", architectures=["UnheardOfForCausalLM"])


def flash_attention(path: Path) -> None:
    edit_config(path, _attn_implementation="flash_attention_2")


def float8(path: Path) -> None:
    edit_weights(
        path, lambda old: {n: v.to(torch.float8_e4m3fn) if n.endswith("q_proj.weight") else v for n, v in old.items()}
    )


def own_weight_file(path: Path) -> None:
    (path / "model.safetensors").rename(path / "other.safetensors")
    edit_config(path, transformers_weights="other.safetensors")


def compiled(path: Path) -> None:
    edit_weights(path, lambda old: {f"_orig_mod.{name}": value for name, value in old.items()})


def distributed(path: Path) -> None:
    edit_weights(path, lambda old: {f"module.{name}": value for name, value in old.items()})


def of_peft(path: Path) -> None:
    edit_weights(path, lambda old: {f"base_model.model.{name}": value for name, value in old.items()})


def gguf(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()
    (path / "model-q4.gguf").write_bytes(b"GGUF")


def many_layers(path: Path) -> None:
    edit_config(path, num_hidden_layers=10_000)


def deep_config(path: Path) -> None:
    (path / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


def tokenizer_list(path: Path) -> None:
    (path / "tokenizer.json").write_text("[]")


def tokenizer_null(path: Path) -> None:
    (path / "tokenizer.json").write_text("null")
    (path / "tokenizer_config.json").write_text("null")


def fewer_words(path: Path) -> None:
    edit_config(path, vocab_size=60)


LOADED = [
    newer_single, newer_single_beside_shards, head_apart, head_twice, head_only, shards_in_a_folder, linked_shards,
    native_class_with_code, flash_attention,
]  # fmt: skip
REFUSED = [
    (fewer_words, r"shape|mismatch"),
    (adapter_beside, "adapter_config.json beside full weights"),
    (adapter_alone, "--merge-adapter DIR"),
    (shards_outside, "outside of the directory"),
    (index_without_metadata, "not a weight index"),
    (foreign_class_with_code, "custom code"),
    (float8, "float8_e4m3fn"),
    (own_weight_file, "transformers_weights"),
    (compiled, "'_orig_mod.'.*torch.compile"),
    (distributed, "'module.'.*model.module"),
    (of_peft, "'base_model.model.'.*merge_and_unload"),
    (gguf, "GgufConfig"),
    (many_layers, "num_hidden_layers 10000"),
    (deep_config, "config.json: damaged"),
    (tokenizer_list, "no usable tokenizer"),
    (tokenizer_null, "no usable tokenizer"),
]


def reference_loss(path: Path) -> float:
    """Nats per completion token, by a few plain lines."""
    config = transformers.AutoConfig.from_pretrained(path)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    total = count = 0.0
    for row in ROWS:
        prompt = tokenizer(row["prompt"]).input_ids
        target = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(target))
        count += len(target)
    return total / count


@pytest.mark.parametrize("change", LOADED, ids=lambda change: change.__name__)
def test_every_mode_sees_what_transformers_loads(tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = save_checkpoint(tmp_path / "model")
    change(model)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    expected = reference_loss(model)
    for offload in ("none", "cpu", "disk"):
        found = sculptor.evaluate(model, [rows], device="cpu", offload=offload).loss
        assert found == pytest.approx(expected, abs=1e-5), offload
    sculptor.analyze(model, tmp_path / "subspaces", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    losses = []
    for offload in ("none", "disk"):
        tuned = tmp_path / f"tuned-{offload}"
        settings = sculptor.TrainSettings(
            max_steps=2, batch_size=6, micro_batch_size=2, offload=offload, device="cpu", learning_rate=1e-3,
            also_train=("lm_head",),
        )  # fmt: skip
        report = sculptor.train(model, tmp_path / "subspaces", [rows], tuned, settings)
        losses.append([report.loop.first_loss, report.loop.last_loss])
        assert losses[-1][0] == pytest.approx(expected, abs=1e-5)
        assert sculptor.verify(model, tuned, tmp_path / "subspaces", device="cpu").passed
        # What was trained is what loads.
        after = sculptor.evaluate(tuned, [rows], device="cpu").loss
        assert after == pytest.approx(reference_loss(tuned), abs=1e-5)
        assert after < losses[-1][0]
        assert not (tuned / "modeling.py").exists()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_every_mode_refuses_what_cannot_be_told(
    tmp_path: Path, change: Callable[[Path], None], message: str, generator: torch.Generator
) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    sculptor.analyze(model, tmp_path / "subspaces", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    sound = Path(shutil.copytree(model, tmp_path / "sound"))
    change(model)
    settings = sculptor.TrainSettings(max_steps=1, device="cpu")
    runs: dict[str, Callable[[], object]] = {
        "evaluate none": lambda: sculptor.evaluate(model, [rows], device="cpu", offload="none"),
        "evaluate disk": lambda: sculptor.evaluate(model, [rows], device="cpu", offload="disk"),
        "train": lambda: sculptor.train(model, tmp_path / "subspaces", [rows], tmp_path / "out", settings),
    }
    if "tokenizer" not in change.__name__:
        runs |= {
            "analyze": lambda: sculptor.analyze(
                model, tmp_path / "out", sculptor.AnalyzeSettings(basis="weights", device="cpu")
            ),
            "verify": lambda: sculptor.verify(sound, model, tmp_path / "subspaces", device="cpu"),
        }
    for what, run in runs.items():
        if what == "analyze" and change is fewer_words:
            continue  # reads block matrices alone
        if what == "verify" and change in (many_layers, foreign_class_with_code, fewer_words):
            continue  # verify reads tensors; test_verify.py has what it says of configurations
        with pytest.raises(SculptorError, match=message if what != "verify" else None) as caught:
            run()
        assert "\n" not in str(caught.value), what
        assert not (tmp_path / "out").exists(), what


def test_what_goes_along(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    (tmp_path / "elsewhere.txt").write_text("private")
    carried = ["bpe.codes", "source.spm", "vocab.bpe", "additional_chat_templates/tools.jinja", "tokens.txt"]
    carried += ["LICENSE", "LICENSE.model", "licence.pdf", "NOTICE", "USE_POLICY.md", "LICENSES/MIT.txt"]
    left = ["credentials.json", "id_rsa", "service-account.json", ".env", "hf_token", "token.json", "run.sh", "model.py",
            "optimizer.pt", "model.gguf", "my-key.pem", "pytorch_model.bin.index.json", "extra.onnx"]  # fmt: skip
    for name in (*carried, *left):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(name)
    (model / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    edit_config(model, time_step_limit=[0.0, float("inf")])
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    sculptor.analyze(model, tmp_path / "subspaces", sculptor.AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = sculptor.TrainSettings(max_steps=1, save_dtype="float32", device="cpu")
    sculptor.train(model, tmp_path / "subspaces", [rows], tmp_path / "out", settings)
    assert [name for name in carried if not (tmp_path / "out" / name).is_file()] == []
    assert [name for name in (*left, "link.txt") if (tmp_path / "out" / name).exists()] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize(
    "name", ["x.spm", "tokenizer.json", "additional_chat_templates", "additional_chat_templates/a.jinja"]
)
@pytest.mark.parametrize("to", ["outside", ".env"])
def test_a_link_to_what_is_not_of_the_model_is_refused(tmp_path: Path, name: str, to: str) -> None:
    """An output would carry its content to wherever it is published."""
    model = save_checkpoint(tmp_path / "model")
    target = tmp_path / "passwd" if to == "outside" else model / to
    if name.endswith("templates"):
        target.mkdir()
        (target / "a.jinja").write_text("secret")
    else:
        target.write_text("secret")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} is a link to {target}, .*put the file itself in its place"):
        sculptor.analyze(model, tmp_path / "out", sculptor.AnalyzeSettings(basis="weights", device="cpu"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["snapshots/revision", "elsewhere"])
def test_links_into_the_cache_of_the_hub_are_carried_as_files(tmp_path: Path, layout: str) -> None:
    made, model = save_checkpoint(tmp_path / "made"), tmp_path / "models--owner--name" / layout
    store = tmp_path / "models--owner--name" / "blobs"
    store.mkdir(parents=True)
    model.mkdir(parents=True)
    (made / "source.spm").write_text("spm")
    for i, file in enumerate(sorted(made.iterdir())):
        file.rename(store / str(i))
        (model / file.name).symlink_to(os.path.relpath(store / str(i), model))
    write_checkpoint(open_checkpoint(model), made, {})
    assert (made / "source.spm").read_text() == "spm"
    assert {file.name for file in made.iterdir()} == {file.name for file in model.iterdir()}
    assert not any(file.is_symlink() for file in made.iterdir())


def test_links_within_a_model_are_carried(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    (model / "tokenizer.json").rename(model / "words.json")
    (model / "tokenizer.json").symlink_to("words.json")
    (tmp_path / "copy").mkdir()
    write_checkpoint(open_checkpoint(model), tmp_path / "copy", {})
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == (model / "words.json").read_text()


def test_a_licence_is_never_left_out_silently(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    (tmp_path / "LICENSE").write_text("free")
    (model / "LICENSE.model").symlink_to(tmp_path / "LICENSE")
    with pytest.raises(
        CheckpointError, match=r"LICENSE.model is a link to .*, and an output would lack it; put the file"
    ):
        sculptor.analyze(model, tmp_path / "out", sculptor.AnalyzeSettings(basis="weights", device="cpu"))
    (model / "LICENSE.model").unlink()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "LICENSE.model").write_text("free")
    assert tokenizer_differences(model, adapter) == []


def of_sentence_transformers(path: Path) -> Path:
    """Modules with weights, beside a trainer's checkpoints and other weights."""
    save_checkpoint(path)
    for folder in ("1_Pooling", "2_Dense", "checkpoint-500", "runs"):
        (path / folder).mkdir()
        (path / folder / "config.json").write_text("{}")
    modules = [{"path": "", "type": "m.Transformer"}, {"path": "1_Pooling", "type": "m.Pooling"}]
    (path / "modules.json").write_text(json.dumps([*modules, {"path": "2_Dense", "type": "m.Dense"}]))
    for name in ("2_Dense/model.safetensors", "checkpoint-500/model.safetensors", "v_head.safetensors"):
        save_file({"linear.weight": torch.ones(4, 4)}, path / name, {"format": "pt"})
    (path / "checkpoint-500" / "optimizer.pt").write_bytes(b"x")
    return path


def test_modules_go_along_whole_and_no_other_folder_does(tmp_path: Path) -> None:
    base, out = of_sentence_transformers(tmp_path / "base"), tmp_path / "out"
    said: list[str] = []
    sculptor.edit(base, base, out, Interpolate(alpha=0.5), notice=said.append)
    assert said == [
        "not in the output, since no part of the model: checkpoint-500/model.safetensors, v_head.safetensors"
    ]
    inside = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file() and file.parent != out}
    assert inside == {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert differences(open_checkpoint(base), open_checkpoint(out)) == []

    def changed(change: Callable[[Path], object], *said: str) -> None:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(out, other)
        change(other / "2_Dense")
        assert differences(open_checkpoint(base), open_checkpoint(other)) == list(said)

    changed(lambda module: (module / "model.safetensors").unlink(), "2_Dense/model.safetensors is missing")
    changed(
        lambda module: save_file({"linear.weight": torch.zeros(4, 4)}, module / "model.safetensors", {"format": "pt"}),
        "2_Dense/model.safetensors differs",
    )
    changed(lambda module: (module / "config.json").write_text("{ }"), "2_Dense/config.json differs")
    changed(
        lambda module: [(module / name).write_text("{}") for name in ("pytorch_model.bin", "sculptor.json")],
        "2_Dense/pytorch_model.bin was added",
        "2_Dense/sculptor.json was added",
    )


def test_modules_whose_weights_would_be_lost_are_refused(tmp_path: Path) -> None:
    base = of_sentence_transformers(tmp_path / "base")
    weights = base / "2_Dense" / "model.safetensors"

    def refusal(wanted: str) -> None:
        with pytest.raises(CheckpointError, match=wanted):
            sculptor.edit(base, base, tmp_path / "out", Interpolate(alpha=0.5))
        with pytest.raises(CheckpointError, match=wanted):
            sculptor.train(base, None, [ROWS], tmp_path / "out")
        assert not list(tmp_path.glob("out*"))

    weights.rename(base / "weights")
    refusal("no safetensors in 2_Dense, a Dense in modules.json")
    (weights.parent / "pytorch_model.bin").write_bytes(b"x")
    refusal("2_Dense/pytorch_model.bin are pickled weights of a module")
    weights.symlink_to(tmp_path / "away")
    (base / "weights").rename(tmp_path / "away")
    refusal("2_Dense/model.safetensors is a link")
    (base / "modules.json").write_text(json.dumps([{"path": "../away"}]))
    refusal("a module in '../away', hidden or outside")
