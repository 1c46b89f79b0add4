"""Loss on the right tokens."""

from typing import Any

import pytest
from conftest import make_tokenizer

from sculptor.data import examples
from sculptor.data.examples import IGNORED, Example, cut_middle, encode, encode_row, resolve_max_length
from sculptor.data.rows import CompletionRow, MessagesRow, TextRow
from sculptor.errors import DataError, SettingsError

MARKED = (
    "{% for m in messages %}w9 {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end>"
    "{% endgeneration %} {% else %}{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = MessagesRow(
    "f:1",
    (
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ),
    (False, True, False, True),
)


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


def test_completion_gets_loss_and_end_of_sequence(tokenizer: Any) -> None:
    (example,) = encode([CompletionRow("f:1", "w0 w1", "w2")], tokenizer, "causal", 16).examples
    assert example.input_ids == (4, 5, 6, 0)
    assert example.labels == (IGNORED, IGNORED, 6, 0)


def test_encoder_decoder_splits_prompt_and_completion(tokenizer: Any) -> None:
    (example,) = encode([CompletionRow("f:1", "w0 w1", "w2")], tokenizer, "seq2seq", 16).examples
    assert (example.input_ids, example.labels) == ((4, 5), (6, 0))


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_messages_have_loss_on_assistant_turns(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    (example,) = encode([TALK], tokenizer, "causal", 32).examples
    w = [4 + i for i in range(10)]
    assert example.input_ids == (w[9], w[1], w[2], w[9], w[3], 0, w[9], w[4], w[9], w[5], w[6], 0)
    on = [label for label in example.labels if label != IGNORED]
    assert on == [w[3], 0, w[5], w[6], 0]


def test_templates_that_rewrite_the_past_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "w{{ messages|length }} " + UNMARKED
    with pytest.raises(DataError, match="f:1: the chat template rewrites earlier turns"):
        encode([TALK], tokenizer, "causal", 32)


def test_messages_need_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="f:1: 'messages' rows need a chat template"):
        encode([TALK], tokenizer, "causal", 32)


def test_the_middle_of_a_long_prompt_is_cut(tokenizer: Any) -> None:
    prompt = " ".join(f"w{i}" for i in range(20))
    found = encode([CompletionRow("f:1", prompt, "w1 w2")], tokenizer, "causal", 9)
    assert found.num_cut == 1
    assert found.examples[0].input_ids == (4, 5, 6, 21, 22, 23, 5, 6, 0)
    assert cut_middle([1, 2, 3], 3) == [1, 2, 3]


def test_a_completion_that_does_not_fit_drops_the_row(tokenizer: Any) -> None:
    rows = [CompletionRow("f:1", "w0", " ".join(["w1"] * 20)), CompletionRow("f:2", "w0", "w1")]
    found = encode(rows, tokenizer, "causal", 10)
    assert (len(found.examples), found.num_dropped, found.num_cut) == (1, 1, 0)
    with pytest.raises(DataError, match="no row fits into 10 tokens"):
        encode(rows[:1], tokenizer, "causal", 10)


def test_long_text_is_cut_into_windows_without_loss_of_tokens(tokenizer: Any) -> None:
    text = TextRow("f", " ".join(f"w{i}" for i in range(23)))
    causal = encode([text], tokenizer, "causal", 8).examples
    assert [example.input_ids for example in causal] == [
        tuple(range(4, 12)),
        tuple(range(12, 20)),
        tuple(range(20, 27)),
    ]
    assert all(example.labels == example.input_ids for example in causal)
    masked = encode([text], make_tokenizer(wrapped=True), "masked", 8).examples
    assert [len(example.input_ids) for example in masked] == [8, 8, 8, 7]
    assert all((example.input_ids[0], example.input_ids[-1]) == (44, 45) for example in masked)
    assert [token for example in masked for token in example.input_ids[1:-1]] == list(range(4, 27))


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (TextRow("f:1", "w1"), "causal", "f:1: empty after tokenisation"),
        (TextRow("f:1", "w1 w2"), "seq2seq", "f:1: an encoder-decoder"),
        (CompletionRow("f:1", "w1", "w2"), "masked", "f:1: an encoder-only"),
        (TALK, "seq2seq", "f:1: an encoder-decoder"),
    ],
)
def test_rows_that_do_not_suit_are_named(tokenizer: Any, row: Any, kind: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode([row], tokenizer, kind, 16)


def test_max_length_is_checked_against_the_model() -> None:
    assert resolve_max_length(None, 64) == 64
    assert resolve_max_length(32, 64) == 32
    with pytest.raises(SettingsError, match="--max-length 65 is more than the 64 positions"):
        resolve_max_length(65, 64)
    with pytest.raises(SettingsError, match="--max-length 0: expected at least 8"):
        resolve_max_length(0, None)
    assert resolve_max_length(None, None) == 1024


def test_templates_that_refuse_the_messages_name_the_row(tokenizer: Any) -> None:
    for template in ("{{ raise_exception('no') }}", "{% for %}", "{{ messages[9].content }}"):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match="f:1: the chat template does not take these messages"):
            encode([TALK], tokenizer, "causal", 32)


def test_a_first_turn_of_the_assistant_needs_no_empty_conversation(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if not messages %}{{ raise_exception('empty') }}{% endif %}" + UNMARKED
    row = MessagesRow("f:1", ({"role": "assistant", "content": "w3"},), (True,))
    (example,) = encode([row], tokenizer, "causal", 32).examples
    assert example.labels == (IGNORED, *example.input_ids[1:]), "the turn's header is the template's"


def test_ids_beyond_the_embeddings_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the tokenizer gives id 23, the model has 20 embeddings"):
        encode([TextRow("f", "w1 w19")], tokenizer, "causal", 16, vocab_size=20)


def test_a_row_without_a_maskable_token_is_refused() -> None:
    with pytest.raises(DataError, match="no token that could be masked"):
        encode([TextRow("f:1", "<mask> <sep>")], make_tokenizer(wrapped=True), "masked", 16)


def with_start(tokenizer: Any) -> Any:
    """The same, putting <pad> before every sequence as its beginning."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 1)])
    tokenizer.bos_token = "<pad>"
    return tokenizer


def test_every_window_of_a_text_has_its_beginning(tokenizer: Any) -> None:
    text = " ".join(f"w{i}" for i in range(20))
    found = encode([TextRow("f", text)], with_start(tokenizer), "causal", 8).examples
    assert [example.input_ids[0] for example in found] == [1, 1, 1]
    assert [token for example in found for token in example.input_ids[1:]] == [4 + i for i in range(20)]


def test_a_beginning_that_is_written_in_the_row_comes_once(tokenizer: Any) -> None:
    tokenizer = with_start(tokenizer)
    (pair,) = encode([CompletionRow("f", "<pad> w1", "w2")], tokenizer, "causal", 16).examples
    assert pair.input_ids == (1, 5, 6, 0)
    (text,) = encode([TextRow("f", "<pad> w1 w2")], tokenizer, "causal", 16).examples
    assert text.input_ids == (1, 5, 6)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_no_space_comes_between_prompt_and_completion(scheme: str) -> None:
    """Tokenizers that put a space before all they read, as Llama's: the joined text decides."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["</s>"], show_progress=False)
    made.train_from_iterator(["hello there: yes no\nmaybe so = ab"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    for prompt, completion, apart in (
        ("hello:", " yes", False),
        ("hello\n", "yes no", False),
        ("hello: ", "yes", True),
        ("hel", "lo yes", True),
    ):
        found = encode_row(CompletionRow("f", prompt, completion), tokenizer, "causal", 64)
        (example,) = found.examples
        assert tokenizer.decode(example.input_ids[:-1]) == prompt + completion
        assert found.apart is apart
        if not apart:
            assert list(example.input_ids[:-1]) == tokenizer(prompt + completion).input_ids


def test_an_empty_prompt_is_refused_where_nothing_stands_before_the_completion(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="f:1: prompt is empty after tokenisation"):
        encode([CompletionRow("f:1", "", "w2")], tokenizer, "causal", 16)
    (example,) = encode([CompletionRow("f:1", "", "w2")], with_start(tokenizer), "causal", 16).examples
    assert example.labels == (IGNORED, 6, 0)


def test_the_last_token_of_a_text_is_never_lost(tokenizer: Any) -> None:
    text = " ".join(f"w{i}" for i in range(9))
    found = encode([TextRow("f", text)], tokenizer, "causal", 8).examples
    assert [example.labels for example in found] == [tuple(range(4, 12)), (IGNORED, 12)]
    assert found[1].input_ids == (11, 12)


def test_an_end_that_a_prompt_says_comes_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <end>", special_tokens=[("<end>", 0)])
    for prompt, expected in (("w1 w2", (5, 6)), ("w1 w2 <end>", (5, 6, 0))):
        (example,) = encode([CompletionRow("f", prompt, "w3")], tokenizer, "causal", 16).examples
        assert example.input_ids == (*expected, 7, 0)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_an_answer_of_unknown_words_is_refused(tokenizer: Any, kind: Any) -> None:
    with pytest.raises(
        DataError, match=r"^f:2: the tokenizer knows nothing of what is to be learned: all of it is <unk>"
    ):
        encode([CompletionRow("f:1", "w0", "w1"), CompletionRow("f:2", "w0", "totally unknown")], tokenizer, kind, 16)
    assert encode([CompletionRow("f:1", "w0 w9999999", "w1 never")], tokenizer, kind, 16).examples  # a part may be


def test_a_decoder_learns_what_the_tokenizer_writes_as_a_target() -> None:
    """BART's start, a language code: text_target is how every other trainer makes labels."""
    wrapped = make_tokenizer(wrapped=True)
    (example,) = encode([CompletionRow("f:1", "w0 w1", "w2 w3")], wrapped, "seq2seq", 16).examples
    expected = wrapped(text_target="w2 w3").input_ids
    assert len(expected) > 2
    assert example.labels[: len(expected)] == tuple(expected)
    assert wrapped.eos_token_id in example.labels


def test_a_row_of_one_token_is_looked_at_too() -> None:
    one = Example((3,), (1,))
    examples._check_vocabulary("rows", [Example((3,), ()), one], 8)
    with pytest.raises(DataError, match="id 3"):
        examples._check_vocabulary("rows", [Example((3,), ())], 3)
