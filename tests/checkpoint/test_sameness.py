"""What decides how a directory is loaded, beside its tensors: saved in another form it is the same, and under odd names another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_tokenizer, save_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sculptor.checkpoint.heads import find_new_head, plan_head
from sculptor.checkpoint.reader import Checkpoint, open_checkpoint
from sculptor.checkpoint.sameness import differences
from sculptor.checkpoint.tokenizers import notes_of_calls, panics_as_errors

COVERS = [
    "sculptor.checkpoint.config_differences",
    "sculptor.checkpoint.folders",
    "sculptor.checkpoint.tokenizers",
]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def between(base: Path, other: Path) -> list[str]:
    return differences(Checkpoint(base), Checkpoint(other))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved_again(base: Path, out: Path, dtype: Any = "auto") -> Path:
    """As somebody's own loop saves: the model, and the tokenizer likewise."""
    config = json.loads((base / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    cls.from_pretrained(base, dtype=dtype).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def as_it_was(base: Path) -> None: ...


def older(base: Path) -> None:
    """A tokenizer as files of some years ago have it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    added = {str(i): vars_of(token) for i, token in tokenizer.added_tokens_decoder.items()}
    edit(base / "tokenizer_config.json", added_tokens_decoder=added, chat_template=TEMPLATE)
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    (base / "special_tokens_map.json").write_text(json.dumps(names))


def vars_of(token: Any) -> dict[str, Any]:
    return {key: getattr(token, key) for key in ("content", "lstrip", "rstrip", "normalized", "single_word", "special")}


def merges_in_one_string(base: Path) -> None:
    """Byte pairs as older files write them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<end>": 3}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(base)
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["merges"] = ["a b"]
    (base / "tokenizer.json").write_text(json.dumps(content))


def vocabulary_alone(base: Path) -> None:
    """BERT's, of which there was no tokenizer.json."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    (base / "tokenizer.json").unlink()
    (base / "vocab.txt").write_text("\n".join(words))
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 64})
    )


def no_generation(base: Path) -> None:
    (base / "generation_config.json").unlink()


def generation_in_the_configuration(base: Path) -> None:
    """As encoder-decoders of some years ago."""
    no_generation(base)
    edit(base / "config.json", num_beams=4, length_penalty=2.0, early_stopping=True)


def prefix_of_nothing(base: Path) -> None:
    """As the tokenizers library writes one that has none; transformers writes it empty."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<|endoftext|>"], show_progress=False)
    tokenizer.post_processor = processors.ByteLevel()
    tokenizer.train_from_iterator(["x y z", "hello there"] * 9, trainer)
    tokenizer.save(str(base / "tokenizer.json"))
    assert json.loads((base / "tokenizer.json").read_text())["model"]["continuing_subword_prefix"] is None
    said = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "model_max_length": 64}
    (base / "tokenizer_config.json").write_text(json.dumps(said))


def tokens_by_name(base: Path) -> None:
    edit(base / "tokenizer_config.json", extra_special_tokens={"image_token": "<mask>"})


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", as_it_was),
        ("llama", prefix_of_nothing),
        ("llama", tokens_by_name),
        ("llama", older),
        ("llama", merges_in_one_string),
        ("llama", no_generation),
        ("t5", no_generation),
        ("t5", generation_in_the_configuration),
        ("bert", vocabulary_alone),
    ],
)
def test_what_transformers_saves_anew_is_the_same(tmp_path: Path, family: str, change: Callable[[Path], None]) -> None:
    base = save_checkpoint(tmp_path / "base", family)
    change(base)
    assert between(base, saved_again(base, tmp_path / "out")) == []


def test_how_to_generate_is_not_added_otherwise(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    no_generation(base)
    out = saved_again(base, tmp_path / "out")
    edit(out / "generation_config.json", temperature=0.3, do_sample=True)
    assert between(base, out) == ["generation_config.json was added"]


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("guidance_scale", False, False),  # a scale of 0, not none
        ("repetition_penalty", False, False),
        ("num_beams", False, False),
        ("bos_token_id", 0.0, False),
        ("pad_token_id", True, False),
        ("do_sample", False, True),
        ("output_attentions", False, True),
    ],
)
def test_what_is_false_of_how_to_generate_is_none_of_a_switch_alone(
    tmp_path: Path, key: str, value: Any, same: bool
) -> None:
    base = save_checkpoint(tmp_path / "base")
    no_generation(base)
    out = saved_again(base, tmp_path / "out")
    edit(out / "generation_config.json", **{key: value})
    assert (between(base, out) == []) == same


@pytest.mark.parametrize(("key", "value"), [("model_max_length", 64.0), ("clean_up_tokenization_spaces", 0)])
def test_numbers_of_a_tokenizer_are_of_their_type(tmp_path: Path, key: str, value: Any) -> None:
    base = save_checkpoint(tmp_path / "base")
    edit(base / "tokenizer_config.json", **{key: 64 if value else False})
    out = saved_again(base, tmp_path / "out")
    assert between(base, out) == []
    edit(out / "tokenizer_config.json", **{key: value})
    assert between(base, out)


def test_tensors_that_decide_in_what_all_are_loaded(tmp_path: Path) -> None:
    """The first of them, where no configuration names a dtype."""
    base = save_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    out = saved_again(base, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["lm_head.weight"].float()}, out / "model.safetensors", {"format": "pt"}
    )
    assert between(base, out) == [], "the configuration names it"
    for folder in (base, out):
        edit(folder / "config.json", dtype=None)
    (found,) = between(base, out)
    assert found.endswith("dtype is named nowhere, and the tensors are of 2, by one of which all of them are loaded")


def renumber(file: Path) -> None:
    """As the library repairs it while loading, and others do not."""
    if not file.is_file():
        transformers.AutoTokenizer.from_pretrained(file.parent).save_pretrained(file.parent)
    content = json.loads(file.read_text())
    content["added_tokens"][0]["id"] = 9
    file.write_text(json.dumps(content))


def padded_and_cut(tokenizer: Any) -> None:
    tokenizer(["w1", "w2 w3"], padding=True)
    tokenizer("w1 w2", truncation=True, max_length=8)


def loaded_with_sides(tokenizer: Any) -> None:
    tokenizer.padding_side = "right"


@pytest.mark.parametrize("use", [padded_and_cut, loaded_with_sides])
@pytest.mark.parametrize("kind", [as_it_was, older])
def test_how_a_tokenizer_was_used_is_no_part_of_it(
    tmp_path: Path, use: Callable[[Any], None], kind: Callable[[Path], None]
) -> None:
    base = save_checkpoint(tmp_path / "base")
    kind(base)
    out = saved_again(base, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    use(tokenizer)
    tokenizer.save_pretrained(out)
    assert between(base, out) == []


@pytest.mark.parametrize("names", [["default"], ["default", "tool_use"]])
def test_templates_in_a_list_are_those_in_files(tmp_path: Path, names: list[str]) -> None:
    base = save_checkpoint(tmp_path / "base")
    listed = [{"name": name, "template": TEMPLATE + name} for name in names]
    edit(base / "tokenizer_config.json", chat_template=listed)
    out = saved_again(base, tmp_path / "out")
    assert (out / "chat_template.jinja").is_file()
    assert between(base, out) == []
    (out / "chat_template.jinja").write_text("other")
    assert between(base, out)


def test_what_a_trainer_leaves_beside_a_model_is_none_of_it(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    out = saved_again(base, tmp_path / "out")
    save_checkpoint(out / "checkpoint-2")
    (out / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (out / "runs" / "today").mkdir(parents=True)
    (out / "runs" / "today" / "events.out.tfevents.1.host").write_bytes(b"x")
    assert between(base, out) == []
    (out / "checkpoint-2" / "trainer_state.json").unlink()  # by whom, then?
    assert between(base, out)


def test_padding_may_be_that_of_the_tokenizer_where_nothing_was_said(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    edit(base / "config.json", pad_token_id=None)
    edit(base / "generation_config.json", pad_token_id=None)
    out = saved_again(base, tmp_path / "out")
    for pad, expected in ((1, True), (0, False)):
        edit(out / "config.json", pad_token_id=pad)
        edit(out / "generation_config.json", pad_token_id=pad)
        assert (between(base, out) == []) == expected


def test_padding_of_how_to_generate_that_is_written_anew(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    no_generation(base)
    edit(base / "config.json", pad_token_id=None)
    for pad, expected in ((1, []), (0, ["generation_config.json was added"])):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model.generation_config.pad_token_id = pad
        model.save_pretrained(tmp_path / f"out-{pad}")
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / f"out-{pad}")
        assert between(base, tmp_path / f"out-{pad}") == expected


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_classifier_may_note_what_its_labels_are(tmp_path: Path, family: str) -> None:
    """A forward pass with labels does."""
    base = save_checkpoint(tmp_path / "base", family)
    transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(
        tmp_path / "of3"
    )
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "of3")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "of3").eval()
    model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([1]))
    assert model.config.problem_type == "single_label_classification"
    model.save_pretrained(tmp_path / "out")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "out")
    assert between(tmp_path / "of3", tmp_path / "out") == []
    edit(
        tmp_path / "out" / "config.json", problem_type="multi_label_classification"
    )  # pipelines would answer otherwise
    assert between(tmp_path / "of3", tmp_path / "out")


def test_a_template_that_only_other_programs_read_is_told(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    shutil.copytree(base, tmp_path / "out")
    (tmp_path / "out" / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'other' }}"}))
    assert between(base, tmp_path / "out") == ["chat_template.json was added"]
    (tmp_path / "out" / "chat_template.json").rename(tmp_path / "out" / "processor_config.json")
    assert between(base, tmp_path / "out") == ["processor_config.json was added"]


def processors_in_two_forms(path: Path) -> tuple[Path, Path]:
    """A base with files of some time ago, and what transformers saves of it today."""
    pytest.importorskip("PIL")
    pytest.importorskip("torchvision")
    base = save_checkpoint(path / "base")
    image = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(image, transformers.AutoTokenizer.from_pretrained(base), patch_size=8)
    out = saved_again(base, path / "out")
    processor.save_pretrained(out)
    image.save_pretrained(base)
    (base / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", "patch_size": 8}))
    return base, out


def test_a_template_that_was_stale_before_may_stay(tmp_path: Path) -> None:
    """Beside a processor in another form."""
    base, out = processors_in_two_forms(tmp_path)
    for path in (base, out):
        (path / "chat_template.jinja").write_text(TEMPLATE)
        (path / "chat_template.json").write_text(json.dumps({"chat_template": "stale"}))
    assert not [line for line in between(base, out) if "processor" in line or "template" in line]


def test_a_processor_in_another_form_is_the_same(tmp_path: Path) -> None:
    base, out = processors_in_two_forms(tmp_path)
    assert not [line for line in between(base, out) if "processor" in line]


ATTACKS: dict[str, Callable[[Path], object]] = {
    "README.tekken.json": lambda out: (out / "README.tekken.json").write_text("hi"),
    ".tekken.json": lambda out: (out / ".tekken.json").write_text("hi"),
    "hidden template": lambda out: (
        (out / "additional_chat_templates").mkdir(),
        (out / "additional_chat_templates" / ".x.jinja").write_text("x"),
    ),
    "template for other programs": lambda out: (
        (out / "chat_template.jinja").write_text(TEMPLATE),
        edit(out / "tokenizer_config.json", chat_template="other"),
    ),
    "padding side": lambda out: edit(out / "tokenizer_config.json", padding_side="left"),
    "length": lambda out: edit(out / "tokenizer_config.json", model_max_length=7),
    "unknown setting": lambda out: edit(out / "tokenizer_config.json", split_special_tokens=True),
    "numbers of added tokens": lambda out: renumber(out / "tokenizer.json"),
    "tokens that are none": lambda out: edit(
        out / "tokenizer_config.json", added_tokens_decoder={"9": {"content": "<end>", "special": True}}
    ),
    "no such class": lambda out: edit(out / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer"),
    "flags of a token": lambda out: edit(
        out / "tokenizer_config.json", mask_token={"content": "<mask>", "lstrip": True, "special": False}
    ),
    "eos": lambda out: edit(out / "tokenizer_config.json", eos_token="<pad>"),
    "another vocabulary for others": lambda out: (out / "tokenizer.model").write_bytes(b"x"),
    "not loaded": lambda out: (out / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", [older, vocabulary_alone])
def test_what_loads_another_tokenizer_is_told(tmp_path: Path, attack: str, kind: Callable[[Path], None]) -> None:
    base = save_checkpoint(tmp_path / "base", "llama" if kind is older else "bert")
    kind(base)
    shutil.copytree(base, tmp_path / "out")
    assert between(base, tmp_path / "out") == []
    if "tekken" in attack and kind is older:
        pytest.skip("not looked for where there is a tokenizer.json")
    ATTACKS[attack](tmp_path / "out")
    assert between(base, tmp_path / "out")


def test_the_order_of_extra_tokens_decides_their_ids(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    tokens = {"image_token": "<img>", "video_token": "<vid>"}
    edit(base / "tokenizer_config.json", extra_special_tokens=tokens)
    shutil.copytree(base, tmp_path / "out")
    edit(tmp_path / "out" / "tokenizer_config.json", extra_special_tokens=dict(reversed(tokens.items())))
    assert any("the tokenizer that is loaded differs" in line for line in between(base, tmp_path / "out"))


def test_further_tokenizers_of_a_processor_belong_to_the_model(tmp_path: Path) -> None:
    from sculptor.checkpoint.directory import companions

    base = save_checkpoint(tmp_path / "base")
    make_tokenizer(wrapped=True).save_pretrained(base / "qformer_tokenizer")
    (base / "processor_config.json").write_text("{}")
    save_checkpoint(base / "checkpoint-500")
    names = {path.as_posix() for path in companions(base)}
    assert "qformer_tokenizer/tokenizer.json" in names
    assert not any(name.startswith("checkpoint-500") for name in names)
    shutil.rmtree(base / "checkpoint-500")
    shutil.copytree(base, tmp_path / "out")
    assert between(base, tmp_path / "out") == []
    shutil.rmtree(tmp_path / "out" / "qformer_tokenizer")
    assert "qformer_tokenizer/tokenizer.json is missing" in between(base, tmp_path / "out")


def test_modules_behind_a_router_are_modules(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from sculptor.checkpoint.directory import companions

    base = save_checkpoint(tmp_path / "base")
    (base / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "x.models.Router"}]))
    types = {"": "x.models.Transformer", "query_0_Static": "x.models.StaticEmbedding"}
    (base / "router_config.json").write_text(json.dumps({"types": types, "structure": {"query": ["query_0_Static"]}}))
    (base / "query_0_Static").mkdir()
    save_file({"embedding.weight": torch.ones(3, 2)}, base / "query_0_Static" / "model.safetensors")
    assert "query_0_Static/model.safetensors" in {path.as_posix() for path in companions(base)}
    shutil.copytree(base, tmp_path / "out")
    assert between(base, tmp_path / "out") == []
    shutil.rmtree(tmp_path / "out" / "query_0_Static")
    assert "query_0_Static/model.safetensors is missing" in between(base, tmp_path / "out")


def test_small_tensors_that_saving_keeps_wide_are_no_other_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    shutil.copytree(base, tmp_path / "out")
    tensors = load_file(base / "model.safetensors")
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].float()}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert between(base, tmp_path / "out") == []
    save_file(tensors | {name: tensors[name].float() + 1e-4}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert between(base, tmp_path / "out")  # it is rounded where it is loaded


def test_configurations_within_one_are_known_by_their_type(tmp_path: Path) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    module = {**small, "num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8}
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**module),
        decoder=transformers.T5GemmaModuleConfig(**module),
        vocab_size=64,
    )
    torch.manual_seed(0)
    transformers.T5GemmaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert between(tmp_path / "base", saved_again(tmp_path / "base", tmp_path / "out", torch.float32)) == []
    edit(
        tmp_path / "out" / "config.json",
        encoder=json.loads((tmp_path / "out" / "config.json").read_text())["encoder"] | {"dtype": "float16"},
    )
    assert any("encoder.dtype" in line for line in between(tmp_path / "base", tmp_path / "out"))


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("said", [True, False])
def test_a_head_of_ones_own_loop_is_a_new_head(tmp_path: Path, family: str, said: bool) -> None:
    base = save_checkpoint(tmp_path / "base", family)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    if said:
        model.config.problem_type = "single_label_classification"
    model.save_pretrained(tmp_path / "out")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "out")
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    head = find_new_head(before, after)
    assert head is not None
    assert differences(before, after, None, head.config) == []
    edit(tmp_path / "out" / "config.json", problem_type="multi_label_classification")
    after = open_checkpoint(tmp_path / "out")
    head = find_new_head(before, after)
    assert head is None or differences(before, after, None, head.config)


def test_a_head_is_padded_with_the_tokenizers_own_padding(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    before = open_checkpoint(base)
    for pad, expected in ((1, True), (0, False), (5, False)):
        out = tmp_path / f"out-{pad}"
        config = plan_head(before, ["a", "b"], pad).config(before.config)
        model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig.from_dict(config))
        model.save_pretrained(out)
        assert (find_new_head(before, open_checkpoint(out)) is not None) == expected


@pytest.mark.parametrize("name", ["usage.py", "readme.py", "training_code.py", "subspaces/modeling.py"])
def test_code_is_never_for_people(tmp_path: Path, name: str) -> None:
    base = save_checkpoint(tmp_path / "base")
    out = saved_again(base, tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("import os\n")
    assert between(base, out)


def test_how_a_file_cuts_by_itself_is_told(tmp_path: Path) -> None:
    """transformers sets it anew in every call; a program that reads the file alone does not."""
    base = save_checkpoint(tmp_path / "base")
    out = saved_again(base, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    padded_and_cut(tokenizer)
    tokenizer.save_pretrained(out)
    notes = list(notes_of_calls(base, out))
    assert [note.split(" of its own")[0] for note in notes] == ["tokenizer.json has truncation"]
    assert list(notes_of_calls(out, out)) == []


def test_a_library_that_panics_is_an_error(tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As the bindings of `tokenizers` have it, which is no `Exception`."""

    with pytest.raises(ValueError, match="the tokenizers library fails: broken"), panics_as_errors():
        raise PanicException("broken")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
    base = save_checkpoint(tmp_path / "base")
    out = saved_again(base, tmp_path / "out")
    content = json.loads((out / "tokenizer.json").read_text())
    content["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "##b": 2, "ab": 3}, "merges": [["a", "b"]]}
    content["model"]["continuing_subword_prefix"] = "##"
    (out / "tokenizer.json").write_text(json.dumps(content))
    assert between(base, out)
