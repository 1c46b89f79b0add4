"""`train --add-tokens`: rows for new tokens, trained freely; everything old as it was, and `verify` knows which is which."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GROUPED, IDS, Result, make_tokenizer, save_checkpoint, slowly, task_rows, write_rows
from safetensors.torch import load_file, save_file
from together import together

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, evaluate, train, verify
from sculptor.errors import DataError, SculptorError, SettingsError, Stopped
from sculptor.jobs.job import open_base, read_task
from sculptor.jobs.new_tokens import read_tokens
from sculptor.model.samples import read_samples
from sculptor.report.html.verify import verify_page
from sculptor.report.train import train_text
from sculptor.report.verify import verify_text

COVERS = ["sculptor.checkpoint.old_text", "sculptor.checkpoint.vocabulary"]
TOKENS = ("<call>", "</call>", "münze")
SETTINGS = TrainSettings(max_steps=6, batch_size=8, relative_rate=0.05, device="cpu", add_tokens=TOKENS)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KNOWN = 44  # tokens of the tests' tokenizer


def save(path: Path, rows: int, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(GROUPED | {"vocab_size": rows}), **IDS, tie_word_embeddings=tied)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def rows_with_new() -> list[dict[str, str]]:
    return [{"prompt": f"{row['prompt']} <call>", "completion": f"{row['completion']} </call>"} for row in task_rows()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose embedding is as large as the tokenizer, or has two rows more; one of each tuned."""
    path = tmp_path_factory.mktemp("tokens")
    rows = write_rows(path / "rows.jsonl", rows_with_new())
    for name, size, tied in (("exact", KNOWN, False), ("padded", KNOWN + 2, True), ("roomy", 64, False)):
        save(path / name, size, tied)
        analyze(path / name, path / f"{name}-archive", AnalyzeSettings(preserve=0.5, device="cpu"))
        train(path / name, path / f"{name}-archive", [rows], path / f"{name}-tuned", SETTINGS)
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(("name", "before", "after"), [("exact", 44, 47), ("padded", 46, 47), ("roomy", 64, 64)])
def test_old_rows_stay_and_new_ones_learn(made: Path, name: str, before: int, after: int) -> None:
    old, new = tensors(made / name), tensors(made / f"{name}-tuned")
    assert old.keys() == new.keys()
    for tensor in {EMBEDDING, HEAD} & old.keys():
        assert (old[tensor].shape[0], new[tensor].shape[0]) == (before, after)
        kept = [i for i in range(before) if not KNOWN <= i < KNOWN + 3]
        assert torch.equal(new[tensor][kept], old[tensor][kept])
        start = old[tensor][:KNOWN].double().mean(0).float()
        used, unused = new[tensor][KNOWN : KNOWN + 2], new[tensor][KNOWN + 2]
        assert (used - start).abs().max() > 1e-3, "read and said"
        if tensor == EMBEDDING and HEAD in old:
            assert torch.equal(unused, start), "never read: as it began"
        assert new[tensor].isfinite().all()
    tuned = made / f"{name}-tuned"
    config = json.loads((tuned / "config.json").read_text())
    assert config == json.loads((made / name / "config.json").read_text()) | {"vocab_size": after}
    assert (tuned / "generation_config.json").read_bytes() == (made / name / "generation_config.json").read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    assert tokenizer.encode("w3 <call> w4</call>", add_special_tokens=False) == [7, KNOWN, 8, KNOWN + 1]
    assert tokenizer.decode([7, KNOWN + 2]) == "w3 münze"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tuned, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape[0] == after


@pytest.mark.parametrize("name", ["exact", "padded", "roomy"])
def test_the_result_verifies_evaluates_and_goes_on(made: Path, tmp_path: Path, name: str) -> None:
    tuned = made / f"{name}-tuned"
    found = verify(made / name, tuned, made / f"{name}-archive", device="cpu")
    assert (found.passed, found.new_tokens, found.changed_elsewhere) == (True, TOKENS, ())
    assert "new tokens, whose rows are free: 3 ('<call>', '</call>', 'münze')" in verify_text(found)
    many = replace(found, new_tokens=(*(f"<{i}>" for i in range(20)), " the"), also_trained=tuple(map(str, range(20))))
    assert "'<19>', ' the'); old rows" in verify_text(many)
    assert ", 18, 19\n" in verify_text(many)
    assert "' the'" in verify_page(many, "b", "t", "s").replace("&#39;", "'").replace("&#x27;", "'")
    loss = evaluate(tuned, [made / "rows.jsonl"], device="cpu").loss
    assert loss is not None
    assert loss < math.log(len(tensors(tuned)[EMBEDDING])), "better than chance"
    settings = replace(SETTINGS, add_tokens=("<next>",), max_steps=2)
    report = train(tuned, tuned / "subspaces", [made / "rows.jsonl"], tmp_path / "second", settings)
    assert report.new_tokens == ("<next>",)
    assert "New tokens, whose rows were trained: 1 ('<next>')." in train_text(report)
    assert verify(tuned, tmp_path / "second", tuned / "subspaces", device="cpu").passed
    whole = verify(made / name, tmp_path / "second", made / f"{name}-archive", device="cpu")
    assert (whole.passed, whole.new_tokens, whole.num_merges) == (True, (*TOKENS, "<next>"), 2)
    old, new = tensors(tuned), tensors(tmp_path / "second")
    assert torch.equal(old[EMBEDDING][: KNOWN + 3], new[EMBEDDING][: KNOWN + 3]), "the first task's stay now"
    record = json.loads((tmp_path / "second" / "sculptor.json").read_text())
    assert (record["base"]["name"], record["settings"]["add_tokens"]) == (f"{name}-tuned", ["<next>"])


@pytest.mark.parametrize(("name", "offload"), [("padded", "cpu"), *slowly(("exact", "cpu"), ("exact", "disk"))])
def test_streamed_is_resident(made: Path, tmp_path: Path, name: str, offload: Any) -> None:
    settings = replace(SETTINGS, offload=offload, micro_batch_size=4)
    train(made / name, made / f"{name}-archive", [made / "rows.jsonl"], tmp_path / "out", settings)
    train(
        made / name, made / f"{name}-archive", [made / "rows.jsonl"], tmp_path / "resident",
        replace(settings, offload="none"),
    )  # fmt: skip
    streamed, resident = tensors(tmp_path / "out"), tensors(tmp_path / "resident")
    for tensor, value in resident.items():
        assert torch.allclose(streamed[tensor], value, atol=2e-6), tensor


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["cpu", *slowly("none")])
def test_a_stopped_run_goes_on_bit_for_bit(made: Path, tmp_path: Path, offload: Any) -> None:
    settings = replace(SETTINGS, offload=offload, save_every=2)
    inputs = (made / "padded", made / "padded-archive", [made / "rows.jsonl"])
    polled = iter([None, None, 15])
    with pytest.raises(Stopped):
        train(*inputs, tmp_path / "out", settings, stop=lambda: next(polled, None))
    train(*inputs, tmp_path / "out", settings, resume=True)
    train(*inputs, tmp_path / "whole", settings)
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "out.partial").exists()


def test_gradients_are_those_of_the_rows_alone(made: Path) -> None:
    """Against one plain tensor of all rows: the new rows' gradient is that of the whole, and nothing else moves."""
    from sculptor.checkpoint.reader import open_checkpoint
    from sculptor.checkpoint.vocabulary import plan_growth
    from sculptor.training.rows import open_rows

    growth = plan_growth(open_checkpoint(made / "padded"), ["<x>"])
    models = [transformers.AutoModelForCausalLM.from_pretrained(made / "padded").requires_grad_(False) for _ in "ab"]
    (rows,) = open_rows(models[0], growth)
    whole = models[1].get_input_embeddings().weight.requires_grad_(True)
    ids = torch.tensor([[4, KNOWN, 9, KNOWN, 30]])
    for model in models:
        for _ in range(2):  # gradients add up
            model(input_ids=ids, labels=ids).loss.backward()
    assert rows.values.grad is not None
    assert torch.equal(rows.values.grad, whole.grad[growth.start : growth.stop])
    assert rows.whole.grad is None
    before = rows.whole.detach().clone()
    with torch.no_grad():
        rows.values.add_(1)
        models[0](input_ids=ids)
    assert torch.equal((rows.whole - before).abs().amax(1).nonzero().flatten(), torch.arange(KNOWN, KNOWN + 1))


ATTACKS: dict[str, Callable[[Path], None]] = {}


def attack(change: Callable[[Path], None]) -> Callable[[Path], None]:
    ATTACKS[change.__name__] = change
    return change


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    found = tensors(path)
    change(found)
    save_file(found, path / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@attack
def an_old_row_of_the_embedding(path: Path) -> None:
    edit(path, lambda found: found[EMBEDDING][5].mul_(1.01))


@attack
def an_old_row_of_the_head(path: Path) -> None:
    edit(path, lambda found: found[HEAD][KNOWN - 1].mul_(1.01))


@attack
def a_spare_row_that_no_token_has(path: Path) -> None:
    edit(path, lambda found: found[EMBEDDING][KNOWN + 5].mul_(1.01))


@attack
def a_new_row_that_is_no_number(path: Path) -> None:
    edit(path, lambda found: found[EMBEDDING][KNOWN].fill_(float("nan")))


@attack
def a_norm(path: Path) -> None:
    edit(path, lambda found: found["model.norm.weight"].mul_(1.01))


@attack
def a_token_without_a_row_of_its_own(path: Path) -> None:
    entry = {"id": KNOWN + 3, "content": "w1w2", "single_word": False, "lstrip": False, "rstrip": False}
    entry |= {"normalized": False, "special": False}
    edit_json(path / "tokenizer.json", lambda content: content["added_tokens"].append(entry))


@attack
def a_new_token_that_eats_spaces(path: Path) -> None:
    edit_json(path / "tokenizer.json", lambda content: content["added_tokens"][-1].update(lstrip=True))


@attack
def an_old_word_of_the_tokenizer(path: Path) -> None:
    def swap(content: Any) -> None:
        words = content["model"]["vocab"]
        words["w1"], words["w2"] = words["w2"], words["w1"]

    edit_json(path / "tokenizer.json", swap)


@attack
def a_giant_row(path: Path) -> None:
    edit(path, lambda found: found[EMBEDDING][KNOWN].mul_(100))


@attack
def tokens_that_were_taken_out_again(path: Path) -> None:
    edit_json(path / "tokenizer.json", lambda content: content["added_tokens"].pop())


@attack
def another_setting(path: Path) -> None:
    edit_json(path / "config.json", lambda content: content.update(rms_norm_eps=1e-3))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_it_is_no_hole(made: Path, tmp_path: Path, name: str) -> None:
    tuned = Path(shutil.copytree(made / "roomy-tuned", tmp_path / "attacked"))
    assert verify(made / "roomy", tuned, made / "roomy-archive", device="cpu").passed
    ATTACKS[name](tuned)
    try:
        passed = verify(made / "roomy", tuned, made / "roomy-archive", device="cpu").passed
    except SculptorError:
        passed = False
    assert not passed


def test_rows_without_tokens_are_another_shape(made: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(made / "exact-tuned", tmp_path / "attacked"))
    shutil.copy(made / "exact" / "tokenizer.json", tuned)
    with pytest.raises(SculptorError, match=r"has shape \[47, 32\], \[44, 32\] in"):
        verify(made / "exact", tuned, made / "exact-archive", device="cpu")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("w3",), r"--add-tokens 'w3': the tokenizer has it already, id 7"),
        (("<a>", "<a>"), r"--add-tokens '<a>': given twice"),
        (("  ",), "a character that shows"),
        (("tokens.txt",), r"--add-tokens tokens.txt: no such file"),
        (("9",), r"--add-tokens: '9' is a part of 'w9', which the tokenizer has; choose what old text does not have"),
        ((" w9 ",), r"--add-tokens: ' w9 ' is a part of 'w9', which the tokenizer has"),
    ],
)
def test_what_is_no_new_token(made: Path, tmp_path: Path, tokens: tuple[str, ...], message: str) -> None:
    with pytest.raises((SettingsError, DataError), match=message):
        train(
            made / "exact", made / "exact-archive", [made / "rows.jsonl"], tmp_path / "out",
            replace(SETTINGS, add_tokens=tokens),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_the_command_takes_files_and_tokens(made: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    """Without an archive, too: the base is analyzed as it is."""
    (tmp_path / "tokens.txt").write_text("<a>\n\n<b>\n")
    found = cli(
        "train", made / "exact", "--data", made / "rows.jsonl", "--protect-data", made / "rows.jsonl", "-o", tmp_path / "out",
        "--add-tokens", tmp_path / "tokens.txt", "--add-tokens", "<call>", "--max-steps", 2, "--save-dtype", "bfloat16",
        "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert found.json["new_tokens"] == ["<a>", "<b>", "<call>"]
    assert not (tmp_path / "out" / "grown").exists()
    checked = cli("verify", made / "exact", tmp_path / "out", "--subspaces", tmp_path / "out" / "analyzed")
    assert checked.code == 0, checked.out


@pytest.mark.parametrize("family", ["gpt2", *slowly("t5", "bert")])
def test_other_families(tmp_path: Path, family: str) -> None:
    save_checkpoint(tmp_path / "base", family)
    known = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "base"))
    tokens = tuple(f"<n{i}>" for i in range(64 - known + 1))  # one more than there is room for
    analyze(tmp_path / "base", tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    rows = write_rows(tmp_path / "rows.jsonl", task_rows("text" if family == "bert" else "pairs"))
    settings = replace(SETTINGS, add_tokens=tokens, max_steps=2)
    train(tmp_path / "base", tmp_path / "archive", [rows], tmp_path / "out", settings)
    assert verify(tmp_path / "base", tmp_path / "out", tmp_path / "archive", device="cpu").passed
    assert evaluate(tmp_path / "out", [rows], device="cpu").loss is not None


@pytest.mark.slow
def test_several_processes_train_the_same_rows(made: Path, tmp_path: Path) -> None:
    inputs = (made / "padded", made / "padded-archive", [made / "rows.jsonl"])
    settings = replace(SETTINGS, micro_batch_size=2)
    train(*inputs, tmp_path / "one", settings)
    together(2, train, *inputs, tmp_path / "two", settings)
    one, two, base = tensors(tmp_path / "one"), tensors(tmp_path / "two"), tensors(made / "padded")
    assert torch.allclose(one[EMBEDDING], two[EMBEDDING], atol=1e-5)
    assert torch.equal(two[EMBEDDING][:KNOWN], base[EMBEDDING][:KNOWN])


def test_embeddings_that_are_trained_as_a_whole_have_the_rows_too(made: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, also_train=("embed_tokens",))
    train(made / "exact", made / "exact-archive", [made / "rows.jsonl"], tmp_path / "out", settings)
    found = verify(made / "exact", tmp_path / "out", made / "exact-archive", device="cpu")
    assert (found.passed, found.also_trained, found.new_tokens) == (True, (EMBEDDING,), TOKENS)


def test_files_of_tokens_are_read_as_they_are_meant(made: Path, tmp_path: Path) -> None:
    """What an editor leaves is no part of a token; one that no row has is named."""
    file, told = tmp_path / "tokens.txt", []
    file.write_bytes("\ufeff<call>\n\n</call>\n<x>\n".encode())
    settings = replace(SETTINGS, add_tokens=(str(file),))
    found = read_task(*open_base(made / "exact"), [made / "rows.jsonl"], (), settings, told.append)
    assert found.growth is not None
    assert found.growth.tokens == ("<call>", "</call>", "<x>")
    assert told == ["--add-tokens: no row has '<x>': nothing is learned of them but that they are not said"]
    file.write_bytes(b"<a>\r\n<b>\r\n")
    assert read_tokens((str(file),)) == ["<a>", "<b>"]
    file.write_bytes(b"<a>\n<b> \n")
    with pytest.raises(DataError, match=r"line 2: '<b> ' has white space at its end"):
        read_tokens((str(file),))


def test_a_plan_of_several_tasks_takes_none(made: Path, tmp_path: Path) -> None:
    from sculptor.benchmark.plan import read_plan

    (tmp_path / "plan.toml").write_text(
        f'model = "{made}/exact"\n[train]\nadd_tokens = ["<a>"]\n[[tasks]]\nname = "a"\ndata = ["a"]\ntest = ["a"]\n'
    )
    with pytest.raises(SettingsError, match=r"\[train\]: add_tokens would be added by every task"):
        read_plan(tmp_path / "plan.toml")


def test_a_model_that_cannot_is_named(tmp_path: Path) -> None:
    from sculptor.checkpoint.reader import open_checkpoint
    from sculptor.checkpoint.vocabulary import plan_growth

    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config = transformers.BartConfig(vocab_size=64, **small, **heads, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"cannot get new tokens \(final_logits_bias does not grow by rows"):
        plan_growth(open_checkpoint(tmp_path), ["<a>"])


def test_tokens_of_the_chat_template_are_refused_unless_wanted(made: Path, tmp_path: Path) -> None:
    """Every conversation would be read through a row that is trained freely, whether the archive has samples or not."""
    base = tmp_path / "base"
    shutil.copytree(made / "exact", base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ '<|turn|>' + m['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(base)
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    settings = replace(SETTINGS, add_tokens=("<|turn|>",), max_steps=1)
    with pytest.raises(SettingsError, match=r"'<\|turn\|>' stands in the base's chat template; choose"):
        train(base, tmp_path / "archive", [made / "rows.jsonl"], tmp_path / "out", settings)
    wanted = replace(settings, common_tokens=True)
    train(base, tmp_path / "archive", [made / "rows.jsonl"], tmp_path / "out", wanted)
    assert verify(base, tmp_path / "out", tmp_path / "archive", device="cpu").passed
    assert not verify(base, tmp_path / "out", tmp_path / "archive", device="cpu", strict=True).passed


def test_without_samples_nobody_can_tell_whether_new_tokens_stand_in_text(made: Path, tmp_path: Path) -> None:
    """So a strict verification does not pass them, and none says that nothing has changed."""
    base = made / "exact"
    analyze(base, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    tuned = tmp_path / "tuned"
    settings = replace(SETTINGS, add_tokens=("<call>",), max_steps=1, relative_rate=1e-9)
    train(base, tmp_path / "archive", [made / "rows.jsonl"], tuned, settings)
    for strict in (False, True):
        found = verify(base, tuned, tmp_path / "archive", device="cpu", strict=strict)
        assert found.passed != strict
        text = verify_text(found)
        assert "cannot be told: the archive keeps no samples" in text
        assert "are these the same checkpoint" not in text


@pytest.mark.slow
def test_tokens_that_old_text_has_are_refused_unless_wanted(made: Path, tmp_path: Path) -> None:
    """They change how it is read, whatever is protected."""
    analyze(made / "exact", tmp_path / "sampled", AnalyzeSettings(preserve=0.5, samples=True, device="cpu"))
    known = transformers.AutoTokenizer.from_pretrained(made / "exact")
    samples = read_samples(Archive(tmp_path / "sampled"))
    assert samples is not None
    texts = [known.decode(sample.example.input_ids) for sample in samples.all]
    words = next(text for text in texts if text.count(" w") > 2).split()
    pair = next(f"{a} {b[:1]}" for a, b in itertools.pairwise(words) if a[:1] == b[:1] == "w")
    times = sum(text.count(pair) for text in texts)

    def run(token: str, archive: Path, **options: Any) -> list[str]:
        told: list[str] = []
        settings = replace(SETTINGS, add_tokens=("<call>", token), max_steps=1, **options)
        train(made / "exact", archive, [made / "rows.jsonl"], tmp_path / "out", settings, notice=told.append)
        return told

    standing = rf"{pair!r} stands {times} times in what the base says by itself; [\d.]+ % of the tokens of the archive's samples"
    with pytest.raises(SettingsError, match=standing):
        run(pair, tmp_path / "sampled")
    assert not (tmp_path / "out").exists()
    assert any(re.search(standing, line) for line in run(pair, tmp_path / "sampled", common_tokens=True))
    found = verify(made / "exact", tmp_path / "out", tmp_path / "sampled", device="cpu")
    assert found.passed
    assert re.search(standing, "; ".join(found.old_text))
    assert "new tokens in old text: " in verify_text(found)
    strict = verify(made / "exact", tmp_path / "out", tmp_path / "sampled", device="cpu", strict=True)
    assert not strict.passed
    assert "DIFFERS: new tokens: " in verify_text(strict)
    with pytest.raises(SettingsError, match="--common-tokens without effect"):
        TrainSettings(common_tokens=True)
