"""Characters of tokens: whether a tokenizer trims spaces from them or not, they are those that it read."""

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sculptor.data.offsets import token_places

TEXTS = [
    "def f(x):\n        return  1   # ok  \n",
    "  two before, two behind  ",
    "a\n\n   \n b\t c \u00a0 d",
    " \u00e9 \U0001f600  x",
    "<end>  yes <end>",
    "   ",
    "",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([*TEXTS, " yes no yes no", "\n    x\n    y"] * 9, trainer)
    return tokenizer


def loaded(trained: Tokenizer, prefix: bool, processor: Any) -> Any:
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trained.post_processor = processor
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<end>")


def byte_level(prefix: bool, trim: bool) -> Any:
    return processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)


def in_sequence(prefix: bool, trim: bool) -> Any:
    template = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    return processors.Sequence([byte_level(prefix, trim), template])


def roberta(prefix: bool, trim: bool) -> Any:
    return processors.RobertaProcessing(("<end>", 0), ("<end>", 0), trim_offsets=trim, add_prefix_space=prefix)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("make", [byte_level, in_sequence, roberta])
def test_trimmed_places_are_those_that_were_read(trained: Tokenizer, prefix: bool, make: Any) -> None:
    for text in TEXTS:
        expected = token_places(loaded(trained, prefix, make(prefix, False)), text)
        trimmed = loaded(trained, prefix, make(prefix, True))
        ids, places = token_places(trimmed, text)
        assert ids == expected[0]
        assert places[prefix:] == expected[1][prefix:]  # a space that is put before a text has no place there
    assert trimmed("  x  y", return_offsets_mapping=True)["offset_mapping"] != token_places(trimmed, "  x  y")[1]


def test_others_are_left_as_they_are() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_places(made, " a  b ") == ([0, 1], [(1, 2), (4, 5)])


def test_a_space_that_was_put_there_takes_no_character(trained: Tokenizer) -> None:
    """Behind a special token, where a tokenizer begins a text anew."""
    for make in (byte_level, in_sequence, roberta):
        for trim in (False, True):
            tokenizer = loaded(trained, True, make(True, trim))
            _, places = token_places(tokenizer, "yes<end>d")
            assert places[-1] == (8, 9), (make, trim)
