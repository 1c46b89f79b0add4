"""Ways to make a checkpoint pass that should not: each fails, or cannot be checked."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer, save_checkpoint, slowly, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, train, verify
from sculptor.analysis.verify import MatrixVerification, Verification
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.written import not_ours
from sculptor.errors import SculptorError, VerificationError
from sculptor.report.verify import verify_text

NAME = "model.layers.0.mlp.up_proj.weight"
FAST = TrainSettings(max_steps=6, batch_size=8, learning_rate=1e-2, device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of two tasks, in float32 and in bfloat16; the first task of `open` trains the head, too."""
    path = tmp_path_factory.mktemp("attacks")
    rows = write_rows(path / "rows.jsonl", task_rows())
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        here = path / name
        save_checkpoint(here / "base", dtype=dtype)
        analyze(here / "base", here / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
        train(here / "base", here / "archive", [rows], here / "one", FAST)
        train(here / "one", here / "one" / "subspaces", [rows], here / "two", FAST)
    from dataclasses import replace

    here = path / "float32"
    train(here / "base", here / "archive", [rows], here / "open", replace(FAST, also_train=("lm_head",)))
    train(here / "open", here / "open" / "subspaces", [rows], here / "after-open", FAST)
    return path


def attacked(made: Path, tmp_path: Path, dtype: str = "float32", tuned: str = "one") -> Path:
    return Path(shutil.copytree(made / dtype / tuned, tmp_path / "attacked"))


def check(made: Path, tuned: Path, dtype: str = "float32", base: str = "base", **more: Any) -> Verification:
    archive = made / dtype / "archive" if base == "base" else made / dtype / base / "subspaces"
    return verify(made / dtype / base, tuned, archive, device="cpu", **more)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sound_passes(made: Path, dtype: str) -> None:
    assert check(made, made / dtype / "one", dtype).passed
    found = check(made, made / dtype / "two", dtype)
    assert (found.passed, found.num_merges, found.doubt) == (True, 2, None)
    assert check(made, made / dtype / "two", dtype, base="one").passed


def leak(path: Path, size: float) -> None:
    """Adds a leak inside the protected directions, `size` times the update, to one matrix."""
    generator = torch.Generator().manual_seed(1)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors[NAME]
        noise = torch.randn(weight.shape, generator=generator)
        tensors[NAME] = (weight.float() + size * noise * weight.float().std()).to(weight.dtype)

    edit_tensors(path, change)


@pytest.mark.parametrize("claim", ["many merges", "coarse dtypes", "both"])
def test_a_record_excuses_no_leak(made: Path, tmp_path: Path, claim: str) -> None:
    tuned = attacked(made, tmp_path)
    leak(tuned, 1e-5)
    assert not check(made, tuned).passed
    record = json.loads((tuned / "sculptor.json").read_text())
    merge = record["lineage"][-1]
    if claim != "many merges":
        merge["dtypes"] = dict.fromkeys(merge["dtypes"], "bfloat16")
    record["lineage"] = [merge] * (1 if claim == "coarse dtypes" else 5000)
    (tuned / "sculptor.json").write_text(json.dumps(record))
    found = check(made, tuned)
    assert not found.passed
    assert found.num_merges == 1


def test_a_tensor_that_a_record_alone_calls_open_is_changed(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    edit_tensors(tuned, lambda tensors: tensors["lm_head.weight"].add_(0.1))
    record = json.loads((tuned / "sculptor.json").read_text())
    record["also_trained"] = record["lineage"][-1]["opened"] = ["lm_head.weight"]
    (tuned / "sculptor.json").write_text(json.dumps(record))
    found = check(made, tuned)
    assert not found.passed
    assert found.changed_elsewhere == ("lm_head.weight",)


def test_what_one_task_opened_is_closed_for_the_next(made: Path, tmp_path: Path) -> None:
    assert check(made, made / "float32" / "open").also_trained == ("lm_head.weight",)
    assert check(made, made / "float32" / "after-open").passed, "from the base it was open once"
    assert check(made, made / "float32" / "after-open", base="open").passed
    tuned = attacked(made, tmp_path, tuned="after-open")
    edit_tensors(tuned, lambda tensors: tensors["lm_head.weight"].add_(0.1))
    found = check(made, tuned, base="open")
    assert not found.passed
    assert found.also_trained == ()


@pytest.mark.parametrize("which", ["matrices", "everything"])
def test_a_cast_that_nobody_declares_fails(made: Path, tmp_path: Path, which: str) -> None:
    tuned = attacked(made, tmp_path)
    matrices = set(Archive(made / "float32" / "archive"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if which == "everything" or name in matrices:
                tensors[name] = tensors[name].to(torch.bfloat16)

    edit_tensors(tuned, change)
    edit_json(tuned / "config.json", dtype="bfloat16")
    assert not check(made, tuned).passed


def test_a_declared_cast_passes(made: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    here = made / "float32"
    rows = made / "rows.jsonl"
    train(here / "base", here / "archive", [rows], tmp_path / "cast", replace(FAST, save_dtype="bfloat16"))
    found = check(made, tmp_path / "cast")
    assert (found.passed, found.cast) == (True, "bfloat16")
    train(tmp_path / "cast", tmp_path / "cast" / "subspaces", [rows], tmp_path / "next", FAST)
    assert check(made, tmp_path / "next").passed


@pytest.mark.parametrize("rank", [1, *slowly(3)])
def test_a_leak_in_one_direction_does_not_hide_in_the_rounding_of_all(tmp_path: Path, rank: int) -> None:
    """Its norm is within what rounding explains of the whole matrix, its direction is not."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4,
        eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(tmp_path / "base", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(tmp_path / "base", tmp_path / "archive", [rows], tmp_path / "tuned", FAST)

    def verified() -> MatrixVerification:
        found = verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "archive", device="cpu")
        return next(item for item in found.matrices if item.name == NAME)

    sound, base = verified(), load_file(tmp_path / "base" / "model.safetensors")
    u, _, v = torch.linalg.svd(base[NAME].double(), full_matrices=False)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        update = float((tensors[NAME].double() - base[NAME].double()).norm())
        size = 0.7 * sound.rounding * update / rank**0.5
        tensors[NAME] = (tensors[NAME].double() + size * (u[:, :rank] @ v[:rank])).to(torch.bfloat16)

    edit_tensors(tmp_path / "tuned", change)
    found = verified()
    assert found.leak <= 1.25 * sound.rounding
    assert found.peak is not None
    assert sound.peak is not None
    assert sound.holds
    assert sound.peak < 1 < found.peak
    assert not found.holds


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
        ("config.json", {"rms_norm_eps": 0.1}),
        ("config.json", {"dtype": "float16"}),
        ("config.json", {"architectures": ["MistralForCausalLM"]}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        ("config.json", {"attn_implementation": "someone/kernel"}),
        ("config.json", {"experts_implementation": "x/y"}),
        ("config.json", {"dtype": {"": "float16"}}),
        ("config.json", {"dtype": 16}),
        ("config.json", {"repetition_penalty": 9.0}),
        ("config.json", {"rope_theta": 5.0}),
        ("generation_config.json", {"repetition_penalty": 9.0}),
        ("generation_config.json", {"eos_token_id": 0.0}),
        ("tokenizer_config.json", {"add_bos_token": True, "bos_token": "w1"}),
        ("tokenizer.json", None),
        ("chat_template.jinja", "{{ messages }}"),
        ("added_tokens.json", "{}"),
        ("evil.py", "print()"),
        ("pytorch_model.bin", "x"),
        ("extra.safetensors", "x"),
        ("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
    ],
)
def test_what_else_a_user_would_load_is_compared(made: Path, tmp_path: Path, file: str, what: Any) -> None:
    tuned = attacked(made, tmp_path)
    if isinstance(what, dict):
        edit_json(tuned / file, **what)
    elif what is None:
        content = json.loads((tuned / file).read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
        (tuned / file).write_text(json.dumps(content))
    else:
        (tuned / file).write_text(what)
    found = check(made, tuned)
    assert not found.passed
    assert any(file in line for line in found.differences)
    assert all(matrix.holds for matrix in found.matrices)


def test_a_linked_folder_of_templates_is_seen(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / "x").mkdir()
    (tuned / "x" / "default.jinja").write_text("evil")
    (tuned / "additional_chat_templates").symlink_to("x")
    assert "additional_chat_templates/default.jinja was added" in check(made, tuned).differences


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"return_dict": None}),
        ("config.json", {"pad_token_id": True}),
        ("tokenizer_config.json", {"split_special_tokens": None}),
        ("tokenizer_config.json", {"dtype": "float32"}),
    ],
)
def test_null_is_not_nothing_nor_true_one(made: Path, tmp_path: Path, file: str, change: dict[str, Any]) -> None:
    tuned = attacked(made, tmp_path)
    edit_json(tuned / file, **change)
    found = check(made, tuned)
    assert not found.passed
    assert any(file in line for line in found.differences)


def test_a_word_of_a_vocabulary_is_no_setting(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    content = json.loads((tuned / "tokenizer.json").read_text())
    content["model"]["vocab"]["dtype"] = 7
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    assert check(made, tuned).differences == ("tokenizer.json differs",)


def test_files_of_any_tokenizer_are_compared(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / "emoji.json").write_text("{}")
    assert check(made, tuned).differences == ("emoji.json was added",)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_a_huge_update_hides_no_leak(made: Path, tmp_path: Path, scale: float, strict: bool) -> None:
    """What the free directions take does not make room in the others."""
    tuned = attacked(made, tmp_path)
    base = load_file(made / "float32" / "base" / "model.safetensors")[NAME].double()
    u, _, v = torch.linalg.svd(base, full_matrices=False)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        update = tensors[NAME].double() - base
        size = scale * float(base.norm())
        tensors[NAME] = (base + update / update.norm() * size + 0.8e-6 * size * (u[:, :1] @ v[:1])).float()

    edit_tensors(tuned, change)
    assert not check(made, tuned, strict=strict).passed


def test_a_dtype_that_is_not_that_of_the_tensors(made: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    here = made / "bfloat16"
    wide = replace(FAST, save_dtype="float32")
    train(here / "base", here / "archive", [made / "rows.jsonl"], tmp_path / "wide", wide)
    assert check(made, tmp_path / "wide", "bfloat16", strict=True).passed
    edit_json(tmp_path / "wide" / "config.json", dtype="bfloat16")
    found = check(made, tmp_path / "wide", "bfloat16", strict=True)
    assert not found.passed
    assert found.differences


def test_what_may_differ(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    edit_json(tuned / "config.json", transformers_version="9.9", use_cache=False, _name_or_path="somewhere")
    (tuned / "README.md").write_text("mine")
    content = json.loads((tuned / "tokenizer.json").read_text())
    (tuned / "tokenizer.json").write_text(json.dumps(content, indent=4, sort_keys=True))
    assert check(made, tuned).passed


def test_adapters_are_refused(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / "adapter_config.json").write_text("{}")
    with pytest.raises(SculptorError, match="adapter_config\\.json beside full weights"):
        check(made, tuned)


def test_strict_refuses_a_leak_that_only_rounding_explains(made: Path) -> None:
    assert check(made, made / "float32" / "one", strict=True).passed
    found = check(made, made / "bfloat16" / "one", "bfloat16", strict=True)
    assert not found.passed
    assert check(made, made / "bfloat16" / "one", "bfloat16").passed


@pytest.mark.parametrize(
    ("folder", "file", "marker"),
    [
        ("additional_chat_templates", "default.jinja", "archive.json"),
        ("additional_chat_templates", "tool_use.jinja", "sculptor.json"),
        ("additional_chat_templates", "notice.jinja", None),
        ("custom_generate", "generate.py", "sculptor.json"),
    ],
)
def test_a_folder_that_is_read_is_seen_whatever_else_is_in_it(
    made: Path, tmp_path: Path, folder: str, file: str, marker: str | None
) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / folder).mkdir()
    (tuned / folder / file).write_text("evil")
    if marker is not None:
        (tuned / folder / marker).write_text("{}")
    assert f"{folder}/{file} was added" in check(made, tuned).differences


def test_a_number_of_another_kind_in_a_vocabulary_is_seen(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    content = json.loads((tuned / "tokenizer.json").read_text())
    content["model"]["vocab"]["w1"] = float(content["model"]["vocab"]["w1"])
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    assert not check(made, tuned).passed


def test_a_tokenizer_that_is_made_of_nothing_is_another_one(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    save_checkpoint(tmp_path / "base", "gpt2")
    analyze(tmp_path / "base", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(tmp_path / "base", tmp_path / "archive", [rows], tmp_path / "tuned", FAST)
    for file in tmp_path.glob("tuned/*token*"):
        file.unlink()
    transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")  # GPT-2's, without a word
    found = verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "archive", device="cpu")
    assert any("tokenizer.json is missing" in line for line in found.differences)


def test_a_version_by_which_a_tokenizer_is_read_is_seen(made: Path, tmp_path: Path) -> None:
    base, tuned = (Path(shutil.copytree(made / "float32" / name, tmp_path / name)) for name in ("base", "one"))
    for path in (base, tuned):
        edit_json(path / "tokenizer_config.json", fix_mistral_regex=True)
    edit_json(base / "config.json", transformers_version="4.57.3")
    edit_json(tuned / "config.json", transformers_version="4.57.3")
    archive = made / "float32" / "archive"
    assert verify(base, tuned, archive, device="cpu").passed
    edit_json(tuned / "config.json", transformers_version="5.0.0")
    assert any("transformers_version" in line for line in verify(base, tuned, archive, device="cpu").differences)


def test_two_names_for_one_parameter_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "gpt2")
    edit_tensors(
        tmp_path / "base",
        lambda tensors: tensors.update({"h.0.attn.c_attn.weight": tensors["transformer.h.0.attn.c_attn.weight"] + 1}),
    )
    with pytest.raises(SculptorError, match="are both loaded into"):
        analyze(tmp_path / "base", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx",
        "onnx/model.onnx",
        "rust_model.ot",
        "extra.bin",
        "vocab.pkl",
        "weights.npz",
        "original/consolidated.00.pth",
    ],
)
def test_weights_of_any_program_are_seen(made: Path, tmp_path: Path, name: str) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / name).parent.mkdir(exist_ok=True)
    (tuned / name).write_text("x")
    assert check(made, tuned).differences == (f"{name} is a second set of weights, which other programs load",)


def test_what_trainers_leave_is_no_model(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (tuned / name).write_text("x")
    assert check(made, tuned).passed


def test_a_second_dtype_is_seen(made: Path, tmp_path: Path) -> None:
    """Earlier releases of transformers read the other key."""
    tuned = attacked(made, tmp_path)
    edit_json(tuned / "config.json", torch_dtype="float16")
    assert check(made, tuned).differences == ("config.json: dtype was float32, is float16, and the tensors are not",)


@pytest.mark.parametrize("metadata", [None, {"format": "tf"}])
def test_a_header_that_some_programs_do_not_load_is_seen(made: Path, tmp_path: Path, metadata: Any) -> None:
    tuned = attacked(made, tmp_path)
    save_file(load_file(tuned / "model.safetensors"), tuned / "model.safetensors", metadata)
    assert any("model.safetensors: format was pt" in line for line in check(made, tuned).differences)


@pytest.mark.parametrize("what", ["left out", "twice"])
def test_an_index_names_every_tensor_once(tmp_path: Path, what: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    save_checkpoint(tmp_path / "base", max_shard_size="20KB")
    analyze(tmp_path / "base", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(tmp_path / "base", tmp_path / "archive", [rows], tmp_path / "tuned", FAST)
    assert verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "archive", device="cpu").passed
    index = tmp_path / "tuned" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if what == "left out":
        del content["weight_map"][NAME]
        index.write_text(json.dumps(content))
    else:
        first = json.dumps(content).replace('"weight_map": {', f'"weight_map": {{"{NAME}": "other.safetensors", ')
        index.write_text(first)
    found = verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "archive", device="cpu")
    assert not found.passed
    assert len(found.differences) == 1
    assert "index.json" in found.differences[0]


def test_a_header_that_names_a_tensor_twice_is_refused(made: Path, tmp_path: Path) -> None:
    tuned = attacked(made, tmp_path)
    content = (tuned / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode().rstrip()
    twice = header[:-1] + f", {json.dumps(NAME)}: {json.dumps(json.loads(header)[NAME])}}}"
    text = (twice + " " * (-len(twice) % 8)).encode()
    (tuned / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(SculptorError, match=r"up_proj\.weight' twice"):
        check(made, tuned)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_another_encoding_is_another_file(made: Path, tmp_path: Path, file: str, encoding: str) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / file).write_text((tuned / file).read_text(), encoding=encoding)
    assert check(made, tuned).differences == (f"{file} differs",)


@pytest.mark.parametrize(
    ("file", "first"),
    [
        ("tokenizer.json", '"model": {"type": "BPE"}'),
        ("tokenizer_config.json", '"model_max_length": 7'),
        ("generation_config.json", '"eos_token_id": 7'),
        ("config.json", '"rms_norm_eps": 7'),
    ],
)
def test_a_key_that_is_there_twice_is_seen(made: Path, tmp_path: Path, file: str, first: str) -> None:
    """Python takes the last one, other programs the first, or none."""
    tuned = attacked(made, tmp_path)
    base = Path(shutil.copytree(made / "float32" / "base", tmp_path / "base"))
    if file.startswith("tokenizer_"):
        edit_json(base / file, model_max_length=9)
        edit_json(tuned / file, model_max_length=9)
    (tuned / file).write_text(f"{{{first}, " + (tuned / file).read_text().lstrip()[1:])
    found = verify(base, tuned, made / "float32" / "archive", device="cpu")
    assert not found.passed
    assert [line.startswith(file) for line in found.differences] == [True]


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2.0}, {"vocab_size": "64"}, {"transformers_version": {}}])
def test_a_configuration_that_breaks_its_class_is_seen(made: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    tuned = attacked(made, tmp_path)
    edit_json(tuned / "config.json", **changes)
    found = check(made, tuned).differences
    assert len(found) == 1
    assert next(iter(changes)) in found[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_open_tensor_has_to_be_finite(made: Path, tmp_path: Path, value: float) -> None:
    tuned = attacked(made, tmp_path, tuned="open")
    edit_tensors(tuned, lambda tensors: tensors["lm_head.weight"][3].fill_(value))
    with pytest.raises(SculptorError, match=r"lm_head\.weight has 32 NaN or infinite"):
        check(made, tuned)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_an_open_tensor_keeps_its_dtype(made: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tuned = attacked(made, tmp_path, tuned="open")
    edit_tensors(tuned, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(dtype)}))
    found = check(made, tuned)
    assert not found.passed
    assert found.changed_elsewhere == ("lm_head.weight",)


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json"])
def test_a_pipe_is_not_waited_for(made: Path, tmp_path: Path, file: str) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / file).unlink()
    os.mkfifo(tuned / file)
    with pytest.raises(SculptorError, match=f"{file}: is no regular file"):
        check(made, tuned)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/deeper/model.onnx", "license.gguf"])
def test_weights_do_not_hide_among_what_is_ours_or_for_people(made: Path, tmp_path: Path, name: str) -> None:
    tuned = attacked(made, tmp_path)
    (tuned / name).parent.mkdir(parents=True, exist_ok=True)
    (tuned / name).write_text("x")
    (tuned / "onnx").mkdir(exist_ok=True)
    (tuned / "onnx" / "sculptor.json").write_text("{}")
    assert f"{name} is a second set of weights, which other programs load" in check(made, tuned).differences


def test_an_archive_that_protects_nothing_proves_nothing(made: Path, tmp_path: Path) -> None:
    """The first of --rule lowrank has an empty memory, and forbids no change at all."""
    base = made / "float32" / "base"
    analyze(base, tmp_path / "archive", AnalyzeSettings(rule="lowrank", rank=4, device="cpu"))
    train(base, tmp_path / "archive", [made / "rows.jsonl"], tmp_path / "tuned", FAST)
    assert verify(base, tmp_path / "tuned", tmp_path / "tuned" / "opened", device="cpu").passed
    assert not_ours(tmp_path / "tuned") is None  # so it can be overwritten
    with pytest.raises(VerificationError, match=r"protects nothing in any of its 14 matrices.*tuned/opened$"):
        verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu")


def test_a_frozen_entry_does_not_hide_in_the_rounding_of_all(tmp_path: Path) -> None:
    """A declared cast moves every frozen entry by half a unit; all of them together could explain one that doubles."""
    from sculptor.methods.mask import MaskRule
    from sculptor.numerics.masks import pack
    from sculptor.numerics.rounding import leak_allowance, peak_allowance, rounding_variance

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1024, 1024, generator=generator)
    free = base.abs() < 0.1
    rule, tensors = MaskRule((1024, 1024), int(free.sum()), 0.1), {"bits": pack(free)}
    for frozen_times, expected in ((1.0, True), (1.5, False)):
        tuned = base + 0.05 * free
        tuned[0, 0] = base[0, 0] * frozen_times
        stored = tuned.to(torch.bfloat16)
        update = stored.double() - base.double()
        found = rule.violation(tensors, base.double(), update, rounding_variance(stored))
        size, weight = float(update.norm()), float(base.double().norm())
        assert found.norm / size <= leak_allowance(found.rounding / size, found.num_pairs)
        detail = found.detail()
        assert detail.peak is not None
        assert detail.peak_rounding is not None
        assert (detail.peak <= peak_allowance(size, weight, detail.peak_rounding, found.num_pairs)) is expected


def test_what_is_judged_is_what_the_lineage_is_compared_with(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix is read once; where a second look is needed, what has changed since is no proof of anything."""
    tuned = attacked(made, tmp_path, tuned="two")
    read: list[str] = []
    plain = Checkpoint.matrix

    def counted(self: Checkpoint, place: Any) -> torch.Tensor:
        if self.path == tuned:
            read.append(place.name)
        return plain(self, place)

    monkeypatch.setattr(Checkpoint, "matrix", counted)
    assert check(made, tuned).num_merges == 2
    assert sorted(read) == sorted({*read})
    assert {*read} >= {*Archive(made / "float32" / "archive")}

    class Meddling:
        """A bar, at whose end somebody writes into the checkpoint."""

        def __init__(self, **_: Any) -> None: ...

        def update(self, _: int) -> None: ...

        def close(self) -> None:
            edit_tensors(tuned, lambda tensors: tensors[NAME].mul_(1.5))

    shutil.rmtree(tuned / "subspaces")
    shutil.copytree(made / "float32" / "one" / "subspaces", tuned / "subspaces")  # of other matrices
    with pytest.raises(VerificationError, match="its matrices changed while they were read"):
        check(made, tuned, progress=Meddling)


def test_how_much_an_archive_protects_is_told(made: Path) -> None:
    """One that forbids next to nothing proves as much."""
    archive = Archive(made / "float32" / "archive")
    total = sum(record.shape[0] * record.shape[1] for record in archive.values())
    found = check(made, made / "float32" / "one")
    assert found.protected == pytest.approx(1 - archive.num_free / total)
    assert f"the archive protects {100 * found.protected:.1f} % of these matrices" in verify_text(found)


def test_lost_keys_of_generation_are_seen(tmp_path: Path) -> None:
    """Where no generation_config.json is, they are read of config.json; saving a configuration drops them."""
    base, rows = save_checkpoint(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", task_rows())
    (base / "generation_config.json").unlink(missing_ok=True)
    edit_json(base / "config.json", repetition_penalty=1.7, no_repeat_ngram_size=2)
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(base, tmp_path / "archive", [rows], tmp_path / "tuned", FAST)
    assert verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu").passed
    transformers.AutoConfig.from_pretrained(tmp_path / "tuned").save_pretrained(tmp_path / "tuned")
    found = verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu")
    assert not found.passed
    assert "config.json: no_repeat_ngram_size was 2, is not there" in found.differences


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_dtype_in_an_index_is_seen(tmp_path: Path, dtype: str) -> None:
    base = save_checkpoint(tmp_path / "base", max_shard_size="20KB")
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: content[key] for key in content if "dtype" not in key}))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(base, tmp_path / "archive", [rows], tmp_path / "tuned", FAST)
    assert verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu").passed
    edit_json(tmp_path / "tuned" / "model.safetensors.index.json", metadata={"total_size": 1, "dtype": dtype})
    found = verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu")
    assert not found.passed
    assert any("metadata.dtype was None" in line for line in found.differences)


def test_a_dtype_of_an_inner_configuration_is_seen(tmp_path: Path) -> None:
    """Some classes load by that; a cast changes it, too."""
    from dataclasses import replace

    base = save_checkpoint(tmp_path / "base")
    edit_json(base / "config.json", extra_config={"dtype": "float32", "deep_config": {"torch_dtype": "float32"}})
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    for name, dtype in (("tuned", "keep"), ("narrow", "bfloat16")):
        train(base, tmp_path / "archive", [rows], tmp_path / name, replace(FAST, save_dtype=dtype))
        assert verify(base, tmp_path / name, tmp_path / "archive", device="cpu").passed
    inner = json.loads((tmp_path / "narrow" / "config.json").read_text())["extra_config"]
    assert inner == {"dtype": "bfloat16", "deep_config": {"torch_dtype": "bfloat16"}}
    edit_json(tmp_path / "tuned" / "config.json", extra_config=inner | {"dtype": "float16"})
    found = verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu")
    assert not found.passed
    assert "config.json: extra_config.dtype was float32, is float16, and the tensors are not" in found.differences


def test_a_cast_that_overflows_is_no_cast(tmp_path: Path) -> None:
    from dataclasses import replace

    base = save_checkpoint(tmp_path / "base")
    edit_tensors(base, lambda tensors: tensors["model.norm.weight"].mul_(3e5))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(base, tmp_path / "archive", [rows], tmp_path / "tuned", replace(FAST, max_steps=1, learning_rate=1e-5))
    tuned = tmp_path / "tuned"
    save_file(
        {name: value.half() for name, value in load_file(tuned / "model.safetensors").items()},
        tuned / "model.safetensors",
        {"format": "pt"},
    )
    edit_json(tuned / "config.json", dtype="float16")
    record = json.loads((tuned / "sculptor.json").read_text())
    (tuned / "sculptor.json").write_text(json.dumps(record).replace("float32", "float16"))
    found = verify(base, tuned, tmp_path / "archive", device="cpu")
    assert not found.passed
    assert "model.norm.weight" in found.changed_elsewhere


@pytest.mark.parametrize("old", [True, False])
def test_what_saving_makes_of_inner_dtypes_passes(tmp_path: Path, old: bool) -> None:
    """Tensors of two dtypes: a name of before becomes the one of today, and what had none gets the outer one."""
    base, rows = (
        save_checkpoint(tmp_path / "base", dtype=torch.bfloat16),
        write_rows(tmp_path / "rows.jsonl", task_rows()),
    )
    edit_tensors(base, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    edit_json(base / "config.json", extra_config={"torch_dtype": "bfloat16"} if old else {"width": 3})
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    train(base, tmp_path / "archive", [rows], tmp_path / "tuned", FAST)
    inner = json.loads((tmp_path / "tuned" / "config.json").read_text())["extra_config"]
    inner = {key: value for key, value in inner.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
    edit_json(tmp_path / "tuned" / "config.json", extra_config=inner)
    assert verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu").passed
    edit_json(tmp_path / "tuned" / "config.json", extra_config=inner | {"torch_dtype": "float16"})
    assert not verify(base, tmp_path / "tuned", tmp_path / "archive", device="cpu").passed


def test_keys_of_generation_that_nothing_reads_may_go(tmp_path: Path) -> None:
    """A model that does not generate, and values that are the default: saving a configuration drops them."""
    rows = {
        name: write_rows(tmp_path / f"{name}.jsonl", task_rows(kind))
        for name, kind in (("bert", "text"), ("llama", "pairs"))
    }
    for name, keys in (("bert", {"max_length": 128, "num_beams": 3}), ("llama", {"do_sample": False, "top_k": 50})):
        base = save_checkpoint(tmp_path / name, name)
        (base / "generation_config.json").unlink(missing_ok=True)
        edit_json(base / "config.json", **keys)
        analyze(base, tmp_path / f"{name}-archive", AnalyzeSettings(preserve=0.5, device="cpu"))
        train(base, tmp_path / f"{name}-archive", [rows[name]], tmp_path / f"{name}-tuned", FAST)
        tuned = tmp_path / f"{name}-tuned"
        content = json.loads((tuned / "config.json").read_text())
        (tuned / "config.json").write_text(json.dumps({key: content[key] for key in content if key not in keys}))
        assert verify(base, tuned, tmp_path / f"{name}-archive", device="cpu").passed
