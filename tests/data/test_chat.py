"""Conversations as people have them: thinking, tools, weights, templates of every habit."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import write_rows

from sculptor.data.asking import question_of, spoken, tell_ends, tell_plain
from sculptor.data.chat import unread_keys, use_template
from sculptor.data.edges import end_answers_at
from sculptor.data.examples import IGNORED, encode
from sculptor.data.rows import MessagesRow, read_rows
from sculptor.errors import DataError, SettingsError

COVERS = ["sculptor.data.asking", "sculptor.data.conversations", "sculptor.data.left_out"]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the thinking of all turns but the last, and opens it in the generation prompt.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.thinking or '' }}\n</think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
TWO = [*HELLO, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Good bye"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.fixture(scope="module")
def trained() -> Any:
    """A byte-level tokenizer with merges over line ends and words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["Hello there\n\n\nHello\n\n\nGood bye : Hello", "assistant: Hello there\n\nuser: Hi\n"] * 20
    special = ["<|im_start|>", "<|im_end|>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.fixture
def tokenizer(trained: Any) -> Any:
    trained.chat_template = CHATML
    return trained


def learned(tokenizer: Any, path: Path, row: dict[str, Any]) -> list[str]:
    """What carries loss in each example of a row, as text."""
    file = path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    examples = encode(read_rows([file]), tokenizer, "causal", 400).examples
    return [tokenizer.decode([label for label in example.labels if label != IGNORED]) for example in examples]


def test_a_turn_that_begins_with_line_ends(tokenizer: Any, tmp_path: Path) -> None:
    messages = [HELLO[0], {"role": "assistant", "content": "\n\nHello"}]
    (found,) = learned(tokenizer, tmp_path, {"messages": messages})
    assert found.endswith("Hello<|im_end|>\n")
    assert "assistant" not in found


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>\n"), (SPACED, "<|im_end|>\n")])
def test_all_turns_in_one_example(tokenizer: Any, tmp_path: Path, template: str, end: str) -> None:
    tokenizer.chat_template = template
    (found,) = learned(tokenizer, tmp_path, {"messages": TWO})
    assert found.replace(" ", "") == f"Hello there{end}Good bye{end}".replace(" ", "")


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        SPACED,
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}" + CHATML,
    ],
)
def test_a_conversation_may_begin_with_the_assistant(tokenizer: Any, tmp_path: Path, template: str) -> None:
    tokenizer.chat_template = template
    (found,) = learned(tokenizer, tmp_path, {"messages": TWO[1:]})
    assert found.replace(" ", "") == "Hellothere<|im_end|>\nGoodbye<|im_end|>\n", "no header, and no system's words"


def test_turns_one_by_one_where_thinking_is_dropped(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = THINKING
    messages = [dict(message, thinking="hmm") if message["role"] == "assistant" else message for message in TWO]
    found = learned(tokenizer, tmp_path, {"messages": messages})
    assert found == ["hmm\n</think>\nHello there<|im_end|>\n", "hmm\n</think>\nGood bye<|im_end|>\n"]


def test_turns_that_do_not_fit_are_counted_one_by_one(tokenizer: Any, tmp_path: Path) -> None:
    """A row of which some turns are left is no row that fits."""
    tokenizer.chat_template = THINKING
    long = {"role": "assistant", "content": "Good bye " * 200, "thinking": "hmm"}
    messages = [TWO[0], dict(TWO[1], thinking="hmm"), HELLO[0], long]
    encoded = encode(read_rows(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])), tokenizer, "causal", 200)
    assert (len(encoded.examples), encoded.num_dropped) == (1, 1)
    assert str(encoded.says("rows")).startswith("rows: 1 rows or turns dropped (completion too long)")


def test_an_end_is_learned_where_the_template_has_none(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = NO_END
    found = learned(tokenizer, tmp_path, {"messages": TWO})
    assert [text.replace("\n", "").strip() for text in found] == ["Hello there</s>", "Good bye</s>"]


def test_a_special_token_that_the_row_says_ends_nothing(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = NO_END
    messages = [HELLO[0], {"role": "assistant", "content": "Hello<|im_start|>"}]
    (found,) = learned(tokenizer, tmp_path, {"messages": messages})
    assert found.endswith("</s>")


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"training": False}])
def test_turns_left_out_carry_no_loss(tokenizer: Any, tmp_path: Path, off: dict[str, Any]) -> None:
    messages = [TWO[0], TWO[1] | off, *TWO[2:]]
    assert learned(tokenizer, tmp_path, {"messages": messages}) == ["Good bye<|im_end|>\n"]
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}",
    )
    (found,) = learned(tokenizer, tmp_path, {"messages": messages})
    assert found.strip() == "Good bye<|im_end|>"


def test_tools_and_calls_go_to_the_template(tokenizer: Any, tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"messages": [HELLO[0], called, {"role": "tool", "content": "1"}, HELLO[1]], "tools": TOOLS}
    (found,) = learned(tokenizer, tmp_path, row)
    assert found == '<call>f{"a": 1}</call><|im_end|>\nHello there<|im_end|>\n'
    assert learned(tokenizer, tmp_path, row | {"tools": json.dumps(TOOLS)}) == [found]


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": [HELLO[0], {"role": "assistant", "content": ""}]}, CHATML, "turn 2 of the assistant is empty"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": None}]}, CHATML, "no 'content' and no 'tool_calls'"),
        (
            {"messages": [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
            SPACED,
            "leaves out call 1 of message 2",
        ),
        ({"messages": HELLO, "tools": TOOLS}, SPACED, "leaves out 'tools'"),
        ({"messages": [HELLO[0], HELLO[1] | {"tool_calls": [CALL]}]}, SPACED, "leaves out call 1 of message 2"),
        (
            {"messages": [HELLO[0], HELLO[1] | {"tool_calls": [CALL], "weight": 0}, *HELLO]},
            SPACED,
            "leaves out call 1 of message 2",
        ),
        (
            {"messages": [HELLO[0], HELLO[1] | {"reasoning_content": "hm"}]},
            CHATML,
            "renders nothing of turn 2's reasoning",
        ),
        ({"messages": [{"role": "system", "content": "s"}, *HELLO]}, NO_SYSTEM, "leaves out the system message"),
        (
            {"messages": HELLO, "chat_template_kwargs": {"add_generation_prompt": True}},
            CHATML,
            "'add_generation_prompt'",
        ),
        ({"messages": HELLO, "tools": "["}, CHATML, "'tools' is text that is no JSON"),
        ({"messages": [HELLO[0], HELLO[1] | {"weight": 0}]}, CHATML, "every assistant turn is left out"),
        ({"messages": [HELLO[0], HELLO[1] | {"weight": 0.5}]}, CHATML, "weight 0.5; expected 0 or 1"),
        ({"messages": [HELLO[0], HELLO[1] | {"train": "no"}]}, CHATML, 'train "no"; expected true or false'),
        ({"messages": [HELLO[0] | {"weight": 1}, HELLO[1]]}, CHATML, "only the assistant's"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": [{"type": "image"}]}]}, CHATML, "is not text"),
        ({"messages": HELLO}, "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    tokenizer: Any, tmp_path: Path, row: dict[str, Any], template: str, message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message) as caught:
        learned(tokenizer, tmp_path, row)
    assert "rows.jsonl:1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_parts_and_conversational_pairs(tokenizer: Any, tmp_path: Path) -> None:
    parts = [
        HELLO[0],
        {"role": "assistant", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
    ]
    expected = ["Hello there<|im_end|>\n"]
    assert learned(tokenizer, tmp_path, {"messages": parts}) == expected
    pair = {"prompt": [*TWO[:3]], "completion": [TWO[3]]}
    assert learned(tokenizer, tmp_path, pair) == ["Good bye<|im_end|>\n"]


def test_a_template_is_chosen_by_name_or_file(tokenizer: Any, tmp_path: Path) -> None:
    named = {"default": CHATML, "other": SPACED}
    tokenizer.chat_template = dict(named)
    assert learned(tokenizer, tmp_path, {"messages": HELLO}) == ["Hello there<|im_end|>\n"]
    use_template(tokenizer, "other")
    assert tokenizer.chat_template == SPACED
    file = tmp_path / "mine.jinja"
    file.write_text(NO_END)
    use_template(tokenizer, str(file))
    assert tokenizer.chat_template == NO_END
    tokenizer.chat_template = dict(named)
    with pytest.raises(SettingsError, match="default, other"):
        use_template(tokenizer, "nothing")
    tokenizer.chat_template = {"a": CHATML, "b": SPACED}
    with pytest.raises(SettingsError, match="several chat templates"):
        learned(tokenizer, tmp_path, {"messages": HELLO})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", '{\n "prompt": "a"\n}', "JSON over several lines"),
        ("rows.parquet", b"PAR1\xff\xfe", "the datasets library"),
        ("rows.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "preference pairs"),
        ("rows.jsonl", '{"prompt": "a", "completion": "b", "completion": "c"}', "key 'completion' twice"),
        ("rows.jsonl", '{"prompt": ' + "1" * 5000 + "}", "broken JSON"),
        ("rows.jsonl", "{" + ", ".join(f'"{"k" * 500}{i}": 1' for i in range(50)) + "}", "and 42 more"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_rows([path])
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark(tmp_path: Path) -> None:
    for name, text in (("a.txt", "Hello"), ("a.jsonl", '{"text": "Hello"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        (row,) = read_rows([tmp_path / name])
        assert row.text == "Hello"  # type: ignore[union-attr]


USER_AND_ASSISTANT = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL_OR_CONTENT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% elif m.reasoning_content %}{{ m.reasoning_content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT = CHATML.replace("{{ m.content }}", "{{ m.content[:5] }}")
OTHER = {"type": "function", "function": {"name": "other", "arguments": {"b": 2}}}


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([HELLO[0], HELLO[1], {"role": "tool", "content": "1"}, HELLO[1]], USER_AND_ASSISTANT, r"message 3 \(tool\)"),
        ([{"role": "developer", "content": "be nice"}, *HELLO], USER_AND_ASSISTANT, r"message 1 \(developer\)"),
        ([HELLO[0], HELLO[1] | {"tool_calls": [CALL]}], CALL_OR_CONTENT, r"leaves out message 2 \(assistant\)"),
        ([HELLO[0], HELLO[1] | {"reasoning_content": "hm"}], CALL_OR_CONTENT, r"leaves out message 2 \(assistant\)"),
        (
            [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [CALL, OTHER]}],
            CALL_OR_CONTENT,
            r"leaves out call 2 of message 2",
        ),
        (
            [HELLO[0], {"role": "assistant", "content": "<think>hm</think>Hello"}],
            CALL_OR_CONTENT,
            r"leaves out thinking in its content of message 2",
        ),
        ([HELLO[0], {"role": "assistant", "content": "Hello there"}], SHORT, r"leaves out message"),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    tokenizer: Any, tmp_path: Path, messages: list[dict[str, Any]], template: str, message: str
) -> None:
    tokenizer.chat_template = template
    for _ in range(2):  # what is known of a form must not let the next one pass
        with pytest.raises(DataError, match=message) as caught:
            learned(tokenizer, tmp_path, {"messages": messages})
        assert "\n" not in str(caught.value)


def test_what_is_long_is_looked_at_though_its_form_is_known(tokenizer: Any, tmp_path: Path) -> None:
    """Cut at the end, at the start, in the middle: by a template that took short messages of the same form."""
    for cut in ("m.content[:8]", "m.content[-8:]", "m.content[:4] ~ m.content[4:][-4:]"):
        tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ " + cut + " }}")
        assert learned(tokenizer, tmp_path, {"messages": [HELLO[0], {"role": "assistant", "content": "Hello"}]})
        for role in (0, 1):
            messages = [dict(message) for message in HELLO]
            messages[role]["content"] = "Hello there and good bye"
            with pytest.raises(DataError, match=f"leaves out message {role + 1}"):
                learned(tokenizer, tmp_path, {"messages": messages})


def test_thinking_under_another_name_is_learned_or_refused(tokenizer: Any, tmp_path: Path) -> None:
    """transformers 5.24 knows the names of each other; before, the right one is said."""
    messages = [HELLO[0], HELLO[1] | {"reasoning": "hm"}]
    with pytest.raises(DataError, match="renders nothing of turn 2's reasoning; choose another"):
        learned(tokenizer, tmp_path, {"messages": messages})
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.thinking }}{{ m.content }}")
    try:
        assert learned(tokenizer, tmp_path, {"messages": messages}) == ["hmHello there<|im_end|>\n"]
    except DataError as error:
        assert "rename it to 'thinking', which it renders" in str(error)


OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def test_a_generation_prompt_longer_than_the_turn(tokenizer: Any, tmp_path: Path) -> None:
    """What a turn begins with like the rest of that prompt, by chance, is learned all the same."""
    tokenizer.chat_template = OPENED
    for said in ("<b>Hello</b>", "<thin"):
        messages = [HELLO[0], {"role": "assistant", "content": said}, *HELLO]
        (found,) = learned(tokenizer, tmp_path, {"messages": messages})
        assert found == f"{said}<|im_end|>\nHello there<|im_end|>\n"
    tokenizer.chat_template = NO_END.replace("assistant: {% endif %}", "assistant: Hello there\nand{% endif %}")
    assert learned(tokenizer, tmp_path, {"messages": HELLO})[0].startswith("Hello there\n")
    tokenizer.chat_template = NO_END.replace("assistant: {% endif %}", "assistant: Hello there{% endif %}")
    with pytest.raises(DataError, match="turn 2 of the assistant has nothing behind"):
        learned(tokenizer, tmp_path, {"messages": HELLO})


def test_keys_that_a_template_does_not_read_are_named(tokenizer: Any, tmp_path: Path) -> None:
    messages = [HELLO[0] | {"name": "Ann"}, HELLO[1] | {"id": 3}]
    (row,) = read_rows([{"messages": messages}])
    assert isinstance(row, MessagesRow)
    assert unread_keys([row, row], tokenizer) == {"id": 2, "name": 2}
    tokenizer.chat_template = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}")
    assert unread_keys([row], tokenizer) == {"id": 1}


@pytest.mark.parametrize("parsed", [False, True])
def test_arguments_stay_as_they_were_written(tokenizer: Any, tmp_path: Path, parsed: bool) -> None:
    """A template that writes them as they are gets JSON text, and not how Python shows objects."""
    text = '{"city": "Zürich", "ok": true, "n": null}'
    call = {"type": "function", "function": {"name": "f", "arguments": json.loads(text) if parsed else text}}
    messages = [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    shown = "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments }}"
    for joined in (shown, "{{ m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}"):
        tokenizer.chat_template = CHATML.replace(
            "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}" + joined + "{% endif %}"
        )
        (found,) = learned(tokenizer, tmp_path, {"messages": messages})
        assert found.startswith(f"f {text}")


@pytest.mark.parametrize("place", ["user", "tool", "thinking"])
def test_what_else_is_said_decides_nothing_about_arguments(tokenizer: Any, tmp_path: Path, place: str) -> None:
    """Somebody may well say what Python shows of a call's arguments; a template that writes JSON goes on to."""
    shown, thinking = "called with {'city': 'Rome'}", {"thinking": "I call {'city': 'Rome'}"}
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.thinking or '' }}{{ m.content }}")
    messages = [
        {"role": "user", "content": shown if place == "user" else "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call], **(thinking if place == "thinking" else {})},
        {"role": "tool", "content": shown if place == "tool" else "ok"}, HELLO[1],
    ]  # fmt: skip
    assert '<call>f{"city": "Rome"}</call>' in learned(tokenizer, tmp_path, {"messages": messages})[0]


@pytest.mark.parametrize("role", ["Assistant", "model", "gpt", "ai", "tool_call", "function_call"])
def test_an_assistant_by_another_name_is_refused(tokenizer: Any, tmp_path: Path, role: str) -> None:
    with pytest.raises(DataError, match=f"message 2 is of role '{role}', on which there would be no loss") as found:
        learned(tokenizer, tmp_path, {"messages": [HELLO[0], HELLO[1] | {"role": role}, *TWO]})
    assert ("a call in its 'tool_calls'" in str(found.value)) == role.endswith("_call")


@pytest.mark.parametrize(
    ("role", "meant"), [("human", "user"), ("User", "user"), ("System", "system"), ("tool_response", "tool")]
)
def test_roles_by_other_names_are_refused(tokenizer: Any, tmp_path: Path, role: str, meant: str) -> None:
    """A template that writes any role would make a header of it that the model never sees."""
    with pytest.raises(DataError, match=f"message 1 is of role '{role}', which chat templates call '{meant}'"):
        learned(tokenizer, tmp_path, {"messages": [HELLO[0] | {"role": role}, *TWO]})


def test_roles_that_a_template_does_not_name_are_told(tokenizer: Any) -> None:
    rows = read_rows([{"messages": [{"role": "environment", "content": "wet"}, *HELLO]}, {"messages": HELLO}])
    for template, told in ((CHATML, True), (CHATML.replace("m.role }}", "m.role or 'environment' }}"), False)):
        tokenizer.chat_template = template
        lines: list[str] = []
        tell_ends(rows, tokenizer, lines.append)
        found = [line for line in lines if "no name for" in line]
        assert bool(found) == told
        assert not told or found[0].endswith("'environment' in 1 row")


def test_prompts_that_are_learned_without_the_template_are_told(tokenizer: Any) -> None:
    pair = {"prompt": "Who is it?", "completion": " A baker"}
    rendered = {"prompt": f"{tokenizer.all_special_tokens[0]}user Who is it?", "completion": "A baker"}
    rows = read_rows([pair, rendered, {"messages": HELLO}, {"text": "plain"}])
    told: list[str] = []
    tell_plain(rows, tokenizer, told.append)
    assert [line[:47] for line in told] == ["1 of 4 rows are a prompt and its completion, wh"]
    tokenizer.chat_template = None
    tell_plain(rows, tokenizer, told.append)
    assert len(told) == 1


@pytest.mark.parametrize("how", ["added", "special", "stops"])
def test_a_tag_that_a_template_closes_ends_no_turn(trained: Any, how: str) -> None:
    """A turn that is a call gets an end of sequence, where the template ends turns with the next one's start alone."""
    tokenizer = copy.deepcopy(trained)
    token = "</call>" if how == "added" else "<|called|>"
    if how == "added":
        tokenizer.add_tokens([token])
    else:
        tokenizer.add_special_tokens({"extra_special_tokens": [token]})
    if how == "stops":
        end_answers_at(tokenizer, [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(token)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}TOKEN{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ).replace("TOKEN", token)
    rows = read_rows([{"messages": [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]}])
    encoded = encode(rows, tokenizer, "causal", 512, len(tokenizer))
    (example,) = encoded.examples
    last = tokenizer.convert_ids_to_tokens(example.labels[-1])
    assert last == ("</s>" if how == "added" else token)


@pytest.mark.parametrize("key", ["weight", "train", "training"])
def test_only_the_assistant_is_trained(tokenizer: Any, tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="message 1 is of role 'user'; only the assistant's can be trained"):
        learned(tokenizer, tmp_path, {"messages": [HELLO[0] | {key: 1 if key == "weight" else True}, HELLO[1]]})


def test_turns_that_end_where_generation_goes_on_are_told(tokenizer: Any, tmp_path: Path) -> None:
    (row,) = read_rows([{"messages": HELLO}])
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    for stops, told in (((end,), False), ((other, end), False), ((other,), True), ((), True)):
        said: list[str] = []
        changed = copy.deepcopy(tokenizer)
        end_answers_at(changed, stops)
        tell_ends([row], changed, said.append)
        assert bool(said) is told, stops
    assert said[0].startswith("the chat template ends turns with <|im_end|>, where generation does not stop")
    assert f"add {end} to its eos_token_id" in said[0]
    said.clear()
    tell_ends(read_rows([{"prompt": "Hi", "completion": "Hello"}]), changed, said.append)
    assert not said, "answers to prompts end with what generation stops at"


@pytest.mark.parametrize("part", ["name", "arguments"])
def test_a_part_of_a_call_that_is_left_out_is_refused(tokenizer: Any, tmp_path: Path, part: str) -> None:
    messages = [HELLO[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    other = "arguments" if part == "name" else "name"
    shown = "{% if m.tool_calls %}{{ m.tool_calls[0].function." + other + " }}{% endif %}"
    tokenizer.chat_template = re.sub(r"{% for c in .*?{% endfor %}", shown, CHATML)
    with pytest.raises(DataError, match=f"leaves out the {part} of call 1 of message 2"):
        learned(tokenizer, tmp_path, {"messages": messages})


@pytest.mark.parametrize("said", ["d", "end", "m", "<", "|im_", "ok"])
def test_an_answer_may_stand_in_the_name_of_the_end(tokenizer: Any, tmp_path: Path, said: str) -> None:
    """Its turn ends as any other does."""
    answered = [HELLO[0], {"role": "assistant", "content": said}]
    assert learned(tokenizer, tmp_path, {"messages": answered}) == [f"{said}<|im_end|>\n"]
    twice = learned(tokenizer, tmp_path, {"messages": [*HELLO, *answered]})
    assert twice == [f"Hello there<|im_end|>\n{said}<|im_end|>\n"]


def test_spaces_are_learned_whatever_places_tokens_have(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    said = "  x  =  1\n    y "
    row = {"messages": [HELLO[0], {"role": "assistant", "content": said}]}
    backend = tokenizer.backend_tokenizer
    for trim in (False, True):
        backend.post_processor = processors.ByteLevel(trim_offsets=trim)
        try:
            assert learned(tokenizer, tmp_path, row) == [f"{said}<|im_end|>\n"], trim
        finally:
            backend.post_processor = processors.ByteLevel(trim_offsets=False)


def test_a_token_before_the_answer_ends_nothing(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.add_tokens(["</think>"])
    tokenizer.chat_template = NO_END.replace(
        "{{ m.content }}", "{% if m.reasoning_content %}{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    )
    assert "</think>" in tokenizer.chat_template
    messages = [HELLO[0], {"role": "assistant", "reasoning_content": "hm", "content": "A"}]
    (found,) = learned(tokenizer, tmp_path, {"messages": messages})
    assert found.rstrip().endswith("</s>")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (TWO[:3], ["Hello there</s>"]),
        ([*TWO[:3], TWO[3] | {"weight": 0}], ["Hello there</s>"]),
        ([*TWO, TWO[0]], ["Hello there</s>", "Good bye</s>"]),
    ],
)
def test_an_end_is_learned_whatever_follows(
    tokenizer: Any, tmp_path: Path, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    tokenizer.chat_template = NO_END
    found = learned(tokenizer, tmp_path, {"messages": messages})
    assert [text.replace("\n", "").strip() for text in found] == expected
    tokenizer.chat_template = CHATML
    assert len(learned(tokenizer, tmp_path, {"messages": messages})) == 1, "it has ends of its own"


@pytest.mark.parametrize(
    ("habit", "answers", "count"),
    [
        ("m.content", ["    x = 1\n    return x", "Good bye"], 0),
        ("m.content | trim", ["    x = 1\n    return x", "Good bye"], 1),
        ("m.content | trim", ["Good bye\n\n", "Hello"], 0),
        ("m.content | upper", ["Good bye", "Hello"], 2),
        ("m.content.replace('\n\n', '\n')", ["a\n\nb", "Hello"], 1),
    ],
)
def test_a_template_that_rewrites_what_is_learned_is_told(
    tokenizer: Any, tmp_path: Path, habit: str, answers: list[str], count: int
) -> None:
    tokenizer.chat_template = CHATML.replace("m.content", habit)
    talks = [{"messages": [HELLO[0], {"role": "assistant", "content": answer}]} for answer in answers]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    assert encode(read_rows(file), tokenizer, "causal", 512).num_rewritten == count


def test_words_of_the_prompt_do_not_hide_that(tokenizer: Any, tmp_path: Path) -> None:
    """Nor does an earlier turn that is trained by itself tell of it."""
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content | lower if m.role == 'assistant' else m.content)")
    talk = [{"role": "user", "content": "Answer with one of: Yes, No"}, {"role": "assistant", "content": "Yes"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n")
    assert encode(read_rows(file), tokenizer, "causal", 512).num_rewritten == 1


def test_calls_are_asked_and_expected_as_they_are_trained(tokenizer: Any, tmp_path: Path) -> None:
    talk = [*HELLO, {"role": "user", "content": "Call"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n")
    (row,) = read_rows(file)
    assert isinstance(row, MessagesRow)
    found = question_of(row, tokenizer)
    (said,) = found.expected
    assert '<call>f{"a": 1}</call>' in said
    assert "im_end" not in said
    earlier = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}, *TWO[2:]]
    file.write_text(json.dumps({"messages": earlier}) + "\n")
    (row,) = read_rows(file)
    assert isinstance(row, MessagesRow)
    assert '<call>f{"a": 1}</call>' in question_of(row, tokenizer).text, "not JSON text, encoded once more"


def test_thinking_counts_for_the_length_of_an_answer_and_special_tokens_are_said(
    tokenizer: Any, tmp_path: Path
) -> None:
    answer = "<think>\naaa\n</think>\n\nYes"
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [HELLO[0], {"role": "assistant", "content": answer}]}) + "\n")
    (row,) = read_rows(file)
    assert isinstance(row, MessagesRow)
    found = question_of(row, tokenizer)
    assert (found.expected, found.whole) == (("Yes",), answer)
    ids = tokenizer("<|im_start|>Yes", add_special_tokens=False).input_ids
    assert spoken(tokenizer, ids) == "<|im_start|>Yes"
