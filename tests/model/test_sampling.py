"""Text that a small model says by itself: seeded, within the budget, with the loss where it belongs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from conftest import FAMILIES, save_checkpoint

from sculptor import AnalyzeSettings
from sculptor.analysis import sources
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import CheckpointError, DataError
from sculptor.model import sampling
from sculptor.model.load import LoadedModel, load_model
from sculptor.model.samples import draw_samples, kept_samples, num_predicted, tokens_to_draw
from sculptor.model.sampling import continue_prompts, is_word, sample_examples, template_tokens
from sculptor.progress import silent

END = 0
USER, ANSWER, TURN = 4, 5, 6  # the ids of w0, w1, w2
# "w0 WORDS w2 ", then "w1 " where the answer begins.
TEMPLATE = (
    "{% for message in messages %}{{ 'w0 ' if message['role'] == 'user' else 'w1 ' }}{{ message['content'] }}"
    "{{ ' w2 ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w1 ' }}{% endif %}"
)


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedModel:
    return load(tmp_path, "llama")


def load(path: Path, family: str) -> LoadedModel:
    return load_model(open_checkpoint(save_checkpoint(path / family, family)), torch.device("cpu"))


def sample(
    loaded: LoadedModel, num_tokens: int = 300, max_length: int = 32, seed: int = 0, chat: bool = False
) -> tuple[Example, ...]:
    return sample_examples(loaded, num_tokens, max_length, chat=chat, seed=seed, progress=silent)


def num_tokens(examples: Sequence[Example]) -> int:
    return sum(example.length for example in examples)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_seed_decides_the_text(tmp_path: Path, family: str) -> None:
    loaded = load(tmp_path, family)
    first, again, other = (sample(loaded, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "own",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"temperature": 0.1, "top_k": 1}, {"num_beams": 2}],
)
def test_the_checkpoint_s_generation_settings_do_not_bend_the_text(loaded: LoadedModel, own: dict[str, Any]) -> None:
    """Calibration is on what the model says at temperature 1, whatever its card recommends."""
    plain = sample(loaded)
    loaded.model.generation_config.update(do_sample=True, **own)
    before = loaded.model.generation_config
    assert sample(loaded) == plain
    assert loaded.model.generation_config is before


def test_the_caller_s_randomness_is_left_alone(loaded: LoadedModel) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    sample(loaded)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("wanted", [2, 31, 32, 50, 300, 1000])
@pytest.mark.parametrize("max_length", [8, 32, 64])
def test_the_budget_is_kept(loaded: LoadedModel, wanted: int, max_length: int) -> None:
    """All but the last sequence are whole; a single token that is left over carries no loss and may be missing."""
    count_rounds(loaded)
    examples = sample(loaded, wanted, max_length)
    assert wanted - 1 <= num_tokens(examples) <= wanted
    assert all(2 <= example.length <= max_length for example in examples)
    whole = [e for e in examples[:-1] if e.length == max_length or e.input_ids[-1] == END]
    assert len(whole) == len(examples) - 1


def test_a_model_that_says_next_to_nothing_is_left_with_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row in thirty has words: what there is after some rounds is all, and not a matter of hours."""
    loaded.tokenizer.chat_template = TEMPLATE
    rounds = list[int]()

    def converse(loaded: LoadedModel, rows: int, *_: object) -> list[Example]:
        rounds.append(rows)
        return [Example((0, 5, 6), (IGNORED, 5, 6))] * (rows // 30)

    monkeypatch.setattr("sculptor.model.sampling._converse", converse)
    examples = sample(loaded, num_tokens=900, max_length=16, chat=True)
    assert len(rounds) == 8
    assert num_tokens(examples) == 3 * sum(count // 30 for count in rounds)
    monkeypatch.setattr("sculptor.model.sampling._converse", lambda *_: [])
    with pytest.raises(DataError, match="says nothing by itself"):
        sample(loaded, num_tokens=900, max_length=16, chat=True)


def test_one_token_that_is_left_over_ends_the_sampling(loaded: LoadedModel) -> None:
    """No sequence of one token is of use, so nothing is gained by asking for more."""
    loaded.model.generation_config.suppress_tokens = [END]  # every sequence has the full length
    rounds = count_rounds(loaded)
    examples = sample(loaded, num_tokens=17, max_length=8)
    assert num_tokens(examples) in (16, 17)
    assert len(rounds) <= 3


def count_rounds(loaded: LoadedModel) -> list[int]:
    """Grows with every call of the model's own `generate`; far more calls than any budget needs are an error."""
    generate = loaded.model.generate
    rounds: list[int] = []

    def counted(**options: Any) -> Any:
        rounds.append(options["input_ids"].shape[0])
        assert len(rounds) <= 300, "generates again and again"
        return generate(**options)

    loaded.model.generate = counted
    return rounds


def test_free_text_starts_as_a_sequence_does_and_is_learned_in_full(loaded: LoadedModel) -> None:
    examples = sample(loaded)
    assert len(examples) > 1
    for example in examples:
        assert example.labels == example.input_ids
        assert example.input_ids[0] == END  # no token begins a sequence here, so the one that ends the last
        assert END not in example.input_ids[1:-1]


def test_a_token_that_begins_sequences_comes_first(loaded: LoadedModel) -> None:
    loaded.tokenizer.bos_token = "w5"
    assert {example.input_ids[0] for example in sample(loaded)} == {9}


def test_text_of_a_chat_model_begins_with_words(loaded: LoadedModel) -> None:
    """Its sequences begin with a turn: what it says from there is no text."""
    loaded.tokenizer.chat_template = TEMPLATE
    examples = sample(loaded, num_tokens=900, max_length=24)
    special = set(loaded.tokenizer.all_special_ids)
    for example in examples:
        assert example.labels == example.input_ids, "no prompt, so no answer whose beginning would count more"
        assert END not in example.input_ids[:-1]
        assert example.input_ids[0] not in special, "there are no words of letters here"
    assert len({example.input_ids[0] for example in examples}) > len(examples) / 3
    assert num_tokens(examples) >= 899
    assert sample(loaded, num_tokens=900, max_length=24) == examples
    loaded.tokenizer.bos_token = "w5"
    again = sample(loaded, num_tokens=900, max_length=24)
    assert len({example.input_ids[0] for example in again}) > 9, (
        "where the tokenizer puts none before text, none is put"
    )


class Vocabulary(list[str]):
    """A tokenizer of which only this is asked."""

    all_special_ids = (0, 1)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    __hash__ = object.__hash__  # type: ignore[assignment]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self[i] for i in ids)


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["<s>", "end", ".", " river", "x", "12", "stone"], {3, 6}),
        (["<s>", "end", ".", "x", "12"], {2, 3, 4}),
        (["<s>", "<e>"], {0, 1}),
    ],
)
def test_words_are_drawn_where_there_are_some(words: list[str], allowed: set[int]) -> None:
    loaded: Any = SimpleNamespace(tokenizer=Vocabulary(words), architecture=SimpleNamespace(vocab_size=len(words) + 9))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert {sampling._word(loaded) for _ in range(80)} == allowed


def test_a_word_is_letters_alone() -> None:
    assert [is_word(text) for text in (" river", "ab", "a", "x1", "<end>", " ", "don't", "\u00e9t\u00e9")] == [
        True, True, False, False, False, False, False, True
    ]  # fmt: skip


def test_text_is_as_likely_as_the_model_says(loaded: LoadedModel) -> None:
    """Temperature 1 and no truncation, whatever the checkpoint's own generation settings are."""
    loaded.model.generation_config.temperature = 0.1
    loaded.model.generation_config.top_k = 1
    with torch.no_grad():
        expected = loaded.model(torch.tensor([[END]])).logits[0, 0].softmax(dim=-1)
    examples = sample(loaded, num_tokens=6000, max_length=8)
    seconds = torch.tensor([example.input_ids[1] for example in examples])
    shares = torch.bincount(seconds, minlength=64) / len(examples)
    assert len(examples) > 500
    assert float((shares - expected).abs().max()) < 4 * (0.25 / len(examples)) ** 0.5


def test_chat_needs_a_template(loaded: LoadedModel) -> None:
    with pytest.raises(CheckpointError, match="--chat needs a chat template, and the tokenizer has none") as caught:
        sample(loaded, chat=True)
    assert "\n" not in str(caught.value)


def test_a_template_has_to_show_what_the_user_says(loaded: LoadedModel) -> None:
    loaded.tokenizer.chat_template = "w0 w1 w2"
    with pytest.raises(CheckpointError, match="the chat template leaves out the user's words"):
        sample(loaded, chat=True)


def test_chat_learns_the_answers(loaded: LoadedModel) -> None:
    loaded.tokenizer.chat_template = TEMPLATE
    examples = sample(loaded, num_tokens=600, max_length=48, chat=True)
    assert len(examples) > 3
    assert num_tokens(examples) <= 600
    for example in examples[:-1]:
        assert example.length <= 48
        start = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        prompt, answer = example.input_ids[:start], example.input_ids[start:]
        assert example.labels[start:] == answer
        assert prompt[0] == USER
        assert prompt[-2:] == (TURN, ANSWER)
        assert len(prompt) > 3
        assert not {END, TURN} & set(answer[:-1])
        assert answer[-1] in (END, TURN) or example.length <= 48
    assert any(example.labels[0] == IGNORED for example in examples)
    assert sample(loaded, num_tokens=600, max_length=48, chat=True) == examples
    assert sample(loaded, num_tokens=600, max_length=48, chat=True, seed=1) != examples


# A system's turn of thirty tokens goes first, as with many chat models.
WORDY = "{{ '" + "w9 " * 30 + "' }}" + TEMPLATE


def test_a_long_template_leaves_room_for_answers(loaded: LoadedModel) -> None:
    """Of each conversation by itself: another's long question takes nothing from its answer."""
    loaded.tokenizer.chat_template = WORDY
    assert template_tokens(loaded) == 30 + 3
    examples = sample(loaded, num_tokens=1200, max_length=64, chat=True)
    for example in examples[:-1]:
        prompt = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORED]
        assert prompt[-2:] == [TURN, ANSWER]
        assert example.length == 64 or example.input_ids[-1] in (END, TURN)
        assert len(prompt) <= 33 + (64 - 33) // 2


@pytest.mark.parametrize("chat", [True, False])
def test_a_template_s_tokens_are_not_the_model_s(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """What is calibrated on, where nothing was said of its length."""
    monkeypatch.setattr(sources, "SAMPLED_LENGTH", (20, 30))
    loaded.tokenizer.chat_template = WORDY
    settings = AnalyzeSettings(basis="curvature", data=("self",), chat=chat, calibration_tokens=400)
    (source,) = sources.sample_sources(loaded, settings, ("self",), silent)
    assert max(example.length for example in source.examples) == (53 if chat else 20)
    more = replace(settings, calibration_tokens=780)
    (source,) = sources.sample_sources(loaded, more, ("self",), silent)
    assert max(example.length for example in source.examples) == (59 if chat else 26), "a thirtieth"
    longer = replace(settings, max_length=60)
    (source,) = sources.sample_sources(loaded, longer, ("self",), silent)
    assert max(example.length for example in source.examples) == 60


def test_a_chat_model_is_calibrated_on_text_too(loaded: LoadedModel) -> None:
    """A quarter of the tokens, beside conversations."""
    loaded.tokenizer.chat_template = TEMPLATE
    settings = AnalyzeSettings(basis="curvature", data=("self",), chat=True, calibration_tokens=800, max_length=40)
    (source,) = sources.sample_sources(loaded, settings, ("self",), silent)
    text = [example for example in source.examples if example.labels == example.input_ids]
    assert all(IGNORED not in example.labels for example in text), "nor is any of it taken for an end"
    said = [example for example in source.examples if example.labels[0] == IGNORED]
    assert (len(text) + len(said), 198 <= num_tokens(text) <= 200) == (len(source.examples), True)
    assert 590 <= num_tokens(said) <= 600
    answers = [(i, label) for e in said for i, label in zip(e.input_ids, e.labels, strict=True) if label != IGNORED]
    ends = [i for i, label in answers if label == END]
    assert {label for i, label in answers if label != i} == {END}, "a tenth of what is said is taken for its end"
    assert 0.03 < sum(i != END for i in ends) / len(answers) < 0.25
    (alone,) = sources.sample_sources(loaded, replace(settings, chat=False), ("self",), silent)
    assert all(example.labels == example.input_ids for example in alone.examples)


def test_rows_are_as_many_as_their_caches_allow(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models with few key heads more; and the first round of conversations takes them for shorter than they may be."""
    monkeypatch.setattr(sampling, "_CACHE_BYTES", {"cpu": 8.0 * 10 * 2 * 2 * 32 * 16})
    heads = loaded.model.config.num_attention_heads
    monkeypatch.setattr(loaded.model.config, "num_key_value_heads", heads)
    alike = sampling._rows_at_once(loaded, 16)
    monkeypatch.setattr(loaded.model.config, "num_key_value_heads", heads // 2)
    assert sampling._rows_at_once(loaded, 16) == 2 * alike
    rounds: list[int] = []
    plain = sampling._converse
    monkeypatch.setattr(sampling, "_converse", lambda a, rows, *rest: (rounds.append(rows), plain(a, rows, *rest))[1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(sampling, "_CACHE_BYTES", {"cpu": 1e9})
    loaded.tokenizer.chat_template = TEMPLATE
    sample(loaded, num_tokens=600, max_length=48, chat=True)
    assert rounds[0] == math.ceil(1.15 * 600 / int(0.7 * 48))


def test_a_template_without_room_is_refused(loaded: LoadedModel) -> None:
    loaded.tokenizer.chat_template = WORDY
    with pytest.raises(CheckpointError, match="the chat template takes 33 tokens, and sequences have 40: too few"):
        sample(loaded, max_length=40, chat=True)


def test_what_is_kept_of_a_chat_model_is_its_answers(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of its own tokens with a long template as with a short one."""
    monkeypatch.setattr("sculptor.model.samples.TOKENS", 1500)
    found = []
    for template in (TEMPLATE, WORDY):
        loaded.tokenizer.chat_template = template
        samples = draw_samples(loaded, 128, 3, silent)
        found.append(sum(num_predicted(sample.example) for sample in samples.all))
        assert found[-1] > 0.3 * tokens_to_draw(loaded)
    assert found[1] == pytest.approx(found[0], rel=0.25)


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("chat", [False, True])
def test_models_that_do_not_speak_are_refused(tmp_path: Path, family: str, chat: bool) -> None:
    loaded = load(tmp_path, family)
    with pytest.raises(CheckpointError, match="only a causal model can sample text; give --data files") as caught:
        sample(loaded, chat=chat)
    assert "\n" not in str(caught.value)


def test_a_budget_without_room_for_a_sequence_is_an_error(loaded: LoadedModel) -> None:
    count_rounds(loaded)
    with pytest.raises(DataError, match="give --data files instead of self"):
        sample(loaded, num_tokens=1)


def test_the_model_is_left_as_it_was(loaded: LoadedModel) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    sample(loaded)
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("chat", [False, True])
def test_the_bar_moves_while_the_model_speaks(loaded: LoadedModel, chat: bool) -> None:
    """Not only behind a round, which takes a minute on a CPU; never back, nor beyond its end."""
    loaded.tokenizer.chat_template = TEMPLATE
    moved: list[int] = []
    bar = SimpleNamespace(update=moved.append, close=lambda: moved.append(0))
    found = sample_examples(loaded, 300, 32, chat=chat, seed=0, progress=lambda **_: bar)  # type: ignore[arg-type, return-value]
    assert found == sample(loaded, chat=chat)
    assert len(moved) > len(found)
    assert min(moved[:-1]) > 0
    assert moved[-1] == 0
    assert num_tokens(found) <= sum(moved) <= 300


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "mixtral", "gemma3", "bamba", "falcon_h1", "openai-gpt", "qwen2_vl"]
)
def test_rows_that_ended_are_left_out_without_a_trace(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most likely continuations are those of one call, however often rows are left out; caches of every kind."""
    makers = {
        "gemma3": lambda: transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"],
                eos_token_id=0, pad_token_id=1, bos_token_id=0,
            )
        ),
        "bamba": lambda: transformers.BambaForCausalLM(
            transformers.BambaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
                mamba_d_state=8, mamba_expand=2, mamba_chunk_size=8, eos_token_id=0, pad_token_id=1, bos_token_id=0,
            )
        ),
        "falcon_h1": lambda: transformers.FalconH1ForCausalLM(
            transformers.FalconH1Config(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
                mamba_chunk_size=8, eos_token_id=0, pad_token_id=1, bos_token_id=0,
            )
        ),
        "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(
            transformers.OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        ),
        "qwen2_vl": lambda: transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(
                text_config={
                    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 1,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
                },
                vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
                image_token_id=63, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60,
            )
        ),
    }  # fmt: skip
    if family in makers:
        monkeypatch.setitem(FAMILIES, family, makers[family])
    loaded = load(tmp_path, family)
    prompts = [[5 + i, *range(7, 7 + i % 4)] for i in range(9)]
    ends = list(range(8, 20))
    found = []
    for stretch in (100, 3, 1):
        monkeypatch.setitem(sampling._STRETCH, "cpu", stretch)
        found.append(continue_prompts(loaded, prompts, 14, ends, temperature=0.0))
    assert len({len(row) for row in found[0]}) > 2
    assert found[0] == found[1] == found[2]
    if family not in ("openai-gpt", "falcon_h1"):  # whose padding moves predictions, or whose states see it
        assert found[0] == [continue_prompts(loaded, [prompt], 14, ends, temperature=0.0)[0] for prompt in prompts]


def test_a_model_that_transformers_cannot_run_step_by_step_is_told_in_a_line(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(**_: Any) -> None:
        raise ValueError("the cache has no attention layers")

    monkeypatch.setattr(loaded.model, "generate", generate)
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM generates no text .*no attention layers.*give --data"):
        sample(loaded)
    content, reason = kept_samples(loaded, 32, 0, silent)
    assert content is None
    assert "generates no text" in reason


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system message first') }}", "{% for m in messages %}{{ m.content }"]
)
def test_a_template_that_takes_no_lone_turn_is_one_line(loaded: LoadedModel, template: str) -> None:
    loaded.tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match="takes no user's turn by itself") as caught:
        sample(loaded, num_tokens=100, max_length=24, chat=True)
    assert "\n" not in str(caught.value)
    content, reason = kept_samples(loaded, 32, 0, silent)
    assert content is None
    assert "takes no user's turn" in reason, "harm is then left out, and nothing else"


def test_a_conversation_may_begin_with_the_user_s_words(loaded: LoadedModel) -> None:
    loaded.tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{{ ' w2 ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w1 ' }}{% endif %}"
    )
    examples = sample(loaded, num_tokens=200, max_length=24, chat=True)
    assert num_tokens(examples) >= 199


def test_too_few_tokens_for_an_answer_are_told(loaded: LoadedModel) -> None:
    loaded.tokenizer.chat_template = WORDY
    with pytest.raises(DataError, match="20 tokens end before an answer begins; raise --calibration-tokens"):
        sample(loaded, num_tokens=20, max_length=64, chat=True)


def test_a_token_that_the_model_has_not_is_named(loaded: LoadedModel) -> None:
    size = loaded.architecture.vocab_size
    with pytest.raises(CheckpointError, match=f"gives id {size}, the model has {size} embeddings"):
        continue_prompts(loaded, [[3], [size]], 2, [END])
