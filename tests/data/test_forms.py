"""The form of a row is told by its keys, or refused."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_rows

from sculptor.data.examples import encode
from sculptor.data.rows import CompletionRow, MessagesRow, TextRow, digest_rows, read_rows, read_sources, settle
from sculptor.errors import DataError, SettingsError

COVERS = ["sculptor.data.columns"]
TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
SHARED = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
PAIR = {"prompt": "w1", "completion": "w2"}


def one(tmp_path: Path, row: dict[str, Any], columns: Any = None) -> Any:
    (found,) = read_rows([write_rows(tmp_path / "rows.jsonl", [row])], None, columns)
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHARED},
        {"conversations": TALK},
        {"conversation": TALK},
        {"messages": SHARED},
        {"messages": json.dumps(TALK)},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"instruction": "w1", "input": "", "output": "w2"},
        {"instruction": "w1", "output": "w2", "input": None},
        {"messages": [dict(message, name=None, weight=None) for message in TALK], "tools": None, "text": None},
    ],
)
def test_every_form_of_a_conversation_says_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    found = one(tmp_path, row)
    assert isinstance(found, MessagesRow)
    assert list(found.messages) == TALK
    assert found.trained == (False, True)


def test_json_text_is_a_conversation_in_a_table_alone(tmp_path: Path) -> None:
    """Rows of JSON say what they mean: there the text is what is learned, as of a task that writes JSON."""
    texts = [json.dumps(TALK[:1]), json.dumps(TALK[1:])]
    found = one(tmp_path, dict(zip(("prompt", "completion"), texts, strict=True)))
    assert isinstance(found, CompletionRow)
    assert [found.prompt, found.completion] == texts
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], texts, ["[w1]", "no list"]])
    talk, text = read_rows(tmp_path / "a.csv")
    assert isinstance(talk, MessagesRow)
    assert list(talk.messages) == TALK
    assert isinstance(text, CompletionRow)
    assert (text.prompt, text.completion) == ("[w1]", "no list")


@pytest.mark.parametrize("key", ["messages", "conversations", "choices", "references", "history"])
def test_json_in_a_cell_has_each_key_once(tmp_path: Path, key: str) -> None:
    cell = '[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "good", "content": "bad"}]'
    rest = {"instruction": "w1", "output": "w2"} if key == "history" else {}
    rest = {"prompt": "w1", "completion": "w2"} if key in ("choices", "references") else rest
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[key, *rest], [cell, *rest.values()]])
    rows = write_rows(tmp_path / "rows.jsonl", [{key: cell} | rest])
    for path in (tmp_path / "a.csv", rows):
        with pytest.raises(DataError, match=r"(csv:2|jsonl:1): JSON in a cell has key 'content' twice"):
            read_rows(path)


def test_quotes_join_no_rows_of_a_tsv(tmp_path: Path) -> None:
    """Many files of tabs have quotes that are text; a cell of several lines is one where these are no rows of their own."""
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\nq1\t"a\nq2\tb\nq3\tc"\n')
    with pytest.raises(DataError, match=r"a\.tsv:2: quotes make one row of lines 2 to 4"):
        read_rows(tmp_path / "a.tsv")
    (tmp_path / "b.tsv").write_text('prompt\tcompletion\nq1\t"a\nb"\nq2\t"c"\n')
    first, second = read_rows(tmp_path / "b.tsv")
    assert isinstance(first, CompletionRow)
    assert isinstance(second, CompletionRow)
    assert (first.completion, second.completion) == ("a\nb", "c")


def test_sharegpt_has_systems_tools_and_calls(tmp_path: Path) -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}
    talk = [SHARED[0], call, {"from": "observation", "value": "w3"}, SHARED[1] | {"weight": 0}]
    found = one(tmp_path, {"conversations": talk, "system": "w9", "tools": '[{"name": "f"}]'})
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert found.trained == (False, False, True, False, False)
    assert found.tools == ({"name": "f"},)


def test_an_instruction_is_a_conversation_only_for_who_talks(tmp_path: Path) -> None:
    found = one(tmp_path, {"instruction": "w1", "input": "w3", "output": "w2"})
    assert found.messages[0]["content"] == "w1\n\nw3"
    assert settle(found, True) is found
    assert settle(found, False) == CompletionRow(found.where, "w1\n\nw3\n", "w2")
    tokenizer = make_tokenizer()
    (plain,) = encode([found], tokenizer, "causal", 16).examples
    assert plain.input_ids == (5, 7, 6, 0)
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content }} <end> {% endfor %}"
    (spoken,) = encode([found], tokenizer, "causal", 16).examples
    assert spoken.input_ids == (13, 5, 7, 0, 13, 6, 0)
    later = one(tmp_path, {"instruction": "w1", "output": "w2", "history": [["w5", "w6"]]})
    assert [message["content"] for message in later.messages] == ["w5", "w6", "w1", "w2"]
    assert later.trained == (False, True, False, True)


def test_columns_are_named(tmp_path: Path) -> None:
    row = {"question": "w1", "answer": "w2", "text": "w9", "id": 3}
    for columns in ("prompt=question, completion=answer", {"prompt": "question", "completion": "answer"}):
        found = one(tmp_path, row, columns)
        assert (found.prompt, found.completion) == ("w1", "w2")
    said: list[str] = []
    (source,) = read_sources([tmp_path / "rows.jsonl"], None, columns, said.append)
    assert source.unread == {"id": 1, "text": 1}
    assert said == [
        "rows.jsonl: 1 rows read as prompt and completion (question as prompt, answer as completion); "
        "not read: 'id' of 1 rows, 'text' of 1 rows"
    ]
    (source,) = read_sources([[{"prompt": "w8", "q": "w1", "a": "w2"}]], None, "prompt=q,completion=a")
    assert source.unread == {"prompt": 1}, "another column took its name"
    assert one(tmp_path, {"body": "w1"}, "text=body").text == "w1"
    assert one(tmp_path, {"log": SHARED}, "conversations=log").messages[1]["content"] == "w2"
    for wrong, message in (
        ("prompt=nothing", "--columns without effect: no row has 'nothing'"),
        ("question=prompt", "unknown 'question'; known are messages"),
        ("prompt", "expected OURS=THEIRS"),
        ("prompt=question,prompt=answer", "'prompt' twice"),
    ):
        with pytest.raises(SettingsError, match=message):
            one(tmp_path, row, wrong)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            PAIR | {"text": "w3"},
            "could be prompt and completion and text; choose one with --columns prompt=prompt or --col",
        ),
        ({"messages": TALK, **PAIR}, "could be messages and prompt and completion"),
        ({"question": "a", "answer": "b"}, "try --columns prompt=question,completion=answer"),
        (
            {"instruction": "a", "response": "b", "context": "c"},
            "instruction=instruction,input=context,output=response",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"prompt": TALK[:1], "completion": "w2"}, "'prompt' is a list of messages, 'completion' is not"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1 is from 'alien'; expected system, human"),
        ({"instruction": "a", "input": "", "output": " "}, "empty output"),
        (PAIR | {"choices": ["w2", "w3"], "gold": 2}, "'gold' is 2; expected the number of a choice, 0 to 1"),
        (PAIR | {"choices": ["w2", "w3"], "gold": 1}, "'completion' is 'w2', choice 1 is 'w3'"),
        (PAIR | {"choices": ["w2"]}, "1 'choices'; ranking needs at least 2"),
        (PAIR | {"choices": "w2"}, "'choices' is not a list of texts"),
        ({"prompt": "w1", "choices": ["w2", "w3"]}, "'choices' without 'gold'"),
        ({"prompt": "w1", "references": []}, "'references' is not a list of texts"),
        (PAIR | {"weight": 0.5}, "row has weight 0.5; expected 0 or 1"),
        (PAIR | {"train": "no"}, 'row has train "no"; expected true or false'),
        (PAIR | {"label": False}, "'label' is false, as where a completion is not wanted"),
        (PAIR | {"label": "False"}, "'label' is false, as where a completion is not wanted"),
        ({"prompt": TALK[:1], "completion": TALK[1:], "label": False}, "'label' is false"),
        ({"messages": [{"role": "system", "content": "a"}, *TALK], "system": "b"}, "'system' beside a system message"),
        (
            {
                "messages": [
                    TALK[0],
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}],
                    },
                ]
            },
            "message 2 has a call with key 'a' twice in its arguments",
        ),
        ({"messages": TALK, "tools": '[{"a": 1, "a": 2}]'}, "'tools' has key 'a' twice"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "w1"}, row])
    with pytest.raises(DataError, match=message) as caught:
        read_rows([path])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_two_forms_are_told_apart_by_columns(tmp_path: Path) -> None:
    row = PAIR | {"text": "w3"}
    assert one(tmp_path, row, "text=text") == TextRow(f"{tmp_path / 'rows.jsonl'}:1", "w3")
    assert one(tmp_path, row, "prompt=prompt").completion == "w2"


def test_choices_and_references(tmp_path: Path) -> None:
    found = one(tmp_path, {"prompt": "w1", "choices": ["w2", "w3"], "gold": "1"})
    assert (found.completion, found.choices) == ("w3", ("w2", "w3"))
    found = one(tmp_path, {"prompt": "w1", "references": ["w4", "w5"]})
    assert (found.completion, found.references) == ("w4", ("w4", "w5"))
    assert one(tmp_path, {"messages": TALK, "references": ["w5"]}).references == ("w5",)


def test_rows_say_that_they_are_not_trained(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [PAIR, PAIR | {"weight": 0}, PAIR | {"train": False}, PAIR | {"weight": 1}]
    )
    said: list[str] = []
    (source,) = read_sources([path], None, None, said.append)
    assert (len(source.rows), source.num_off) == (2, 2)
    assert said == ["rows.jsonl: 2 rows left out by their own weight"]
    with pytest.raises(DataError, match="no rows; 1 are left out by their own weight"):
        one(tmp_path, PAIR | {"weight": 0})


def test_tables_and_arrays_are_the_equal_jsonl(tmp_path: Path) -> None:
    rows = [{"prompt": f'w{i}, "w1"\nw2', "completion": value} for i, value in enumerate(["1", "NA", " None", "07"])]
    expected = digest_rows(read_rows([write_rows(tmp_path / "rows.jsonl", rows)]))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "b.jsonl").write_text("\ufeff" + json.dumps(rows))
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            table = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    for name in ("a.json", "b.jsonl", "c.csv", "d.tsv"):
        found = read_rows(tmp_path / name)
        assert digest_rows(found) == expected, name
        assert str(tmp_path / name) in found[1].where
    assert read_rows(tmp_path / "c.csv")[1].where == f"{tmp_path / 'c.csv'}:4"
    for given in (rows, iter(rows), tuple(rows)):
        assert digest_rows(read_rows(given)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,completion\na\n", "a.csv:2: 1 cells, the head has 2"),
        ("a.csv", "prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        ("a.csv", 'prompt,completion\n"a,b\n', "no table"),
        ("a.csv", "prompt,completion\na,b\nprompt,completion\nc,d\n", "a.csv:3: the head again"),
        ("a.csv", "prompt,completion\na,b\n\ufeffprompt,completion\nc,d\n", "a.csv:3: the head again"),
        ("a.json", "[1, 2]", "a.json: row 1: expected a JSON object, found int"),
        ("a.json", '[{"text": "a"}, {"text": "b", "text": "c"}]', "key 'text' twice"),
        ("a.json", "[]", "no rows"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00\xff\xff", "packed by gzip"),
    ],
)
def test_broken_tables_name_the_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_cells_keep_their_line_ends_and_lines_of_json_may_have_any(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\r\n"a\r\nb","c\rd"\r\n"e","f"\r\n')
    first, second = read_rows(tmp_path / "a.csv")
    assert isinstance(first, CompletionRow)
    assert (first.prompt, first.completion) == ("a\r\nb", "c\rd")
    assert (first.where, second.where) == (f"{tmp_path / 'a.csv'}:2", f"{tmp_path / 'a.csv'}:5")
    (tmp_path / "a.tsv").write_bytes(b"prompt\tcompletion\ra\tb\rc\td\r")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r\n\r\n{"text": "c"}\r')
    assert [len(read_rows(tmp_path / name)) for name in ("a.tsv", "a.jsonl")] == [2, 3]
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert [row.text for row in read_rows(tmp_path / "a.txt") if isinstance(row, TextRow)] == ["a\r\nb\rc\n"]


@pytest.mark.parametrize(
    ("head", "on", "off", "wrong", "message"),
    [
        ("weight", ("1", "1.0"), ("0", "0.0"), "0.5", r'row has weight "0\.5"; expected 0 or 1'),
        ("train", ("true", "True"), ("FALSE", "false"), "", r'row has train ""; expected true or false'),
    ],
)
def test_cells_tell_which_rows_are_trained(
    tmp_path: Path, head: str, on: tuple[str, ...], off: tuple[str, ...], wrong: str, message: str
) -> None:
    lines = [f"{cell},a,b\n" for cell in (*on, *off)]
    (tmp_path / "a.csv").write_text(f"{head},prompt,completion\n" + "".join(lines))
    assert len(read_rows(tmp_path / "a.csv")) == len(on)
    (tmp_path / "a.csv").write_text(f"{head},prompt,completion\n{wrong},a,b\n")
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "a.csv")


def test_a_pipe_is_refused_since_data_are_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "63")
    for name in ("rows.jsonl", "63"):
        with pytest.raises(DataError, match="a pipe or a device, which can be read only once; write the rows into"):
            read_rows(tmp_path / name)


def test_weights_mix_several_data(tmp_path: Path) -> None:
    a, b = (write_rows(tmp_path / f"{name}.jsonl", [PAIR] * 3) for name in "ab")
    assert [source.weight for source in read_sources([f"{a}:0.3", (b, 0.7)])] == [0.3, 0.7]
    odd = write_rows(tmp_path / "odd:0.5", [PAIR])
    assert read_sources([odd, a])[0].weight is None  # a name that is there goes first
    for given, message in (
        ([f"{a}:0.3"], "a weight without effect"),
        ([f"{a}:0.3", b], "b.jsonl has no weight"),
        ([(a, 0), b], "a weight of 0"),
    ):
        with pytest.raises((SettingsError, DataError), match=message):
            read_sources(given)
    with pytest.raises(SettingsError, match="a weight without effect here"):
        read_rows([f"{a}:0.3", f"{b}:1"])


def test_only_the_rows_that_are_asked_for_are_read() -> None:
    def endless() -> Any:
        while True:
            yield PAIR

    assert len(read_rows(endless(), 5)) == 5


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    for given, message in (
        (5, "data are of type int"),
        ({"prompt": ["a"]}, r"data are of type dict; .*; of columns make rows: Dataset.from_dict"),
        (Frame(), r"data are of type Frame; .*; of a frame make rows: frame.to_dict\('records'\)"),
        ([1, 2], "data are of type int"),
        (iter(["text"]), "expected a JSON object, found str"),
        (str(tmp_path / "nothing"), "no such data file or folder"),
        ("nothing.parquet", "nothing.parquet"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(given)  # type: ignore[arg-type]


class Frame:
    """A table as pandas has it: asked for rows it gives names of columns."""

    columns = ("prompt", "completion")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def iterrows(self) -> Iterator[Any]:
        return iter([(0, {"prompt": "a", "completion": "b"})])


@pytest.mark.parametrize(("ending", "mark"), [("csv", ";"), ("csv", "|"), ("csv", "\t"), ("tsv", ",")])
def test_columns_that_are_told_apart_otherwise_are_named(tmp_path: Path, ending: str, mark: str) -> None:
    file = tmp_path / f"rows.{ending}"
    file.write_text(f"prompt{mark}completion\na{mark}b\n")
    with pytest.raises(DataError) as found:
        read_rows([file])
    assert str(found.value).endswith(f"; columns are told apart by commas in .csv, by tabs in .tsv, not by {mark!r}")


def test_a_list_of_texts_is_no_conversation() -> None:
    with pytest.raises(
        DataError, match="message 1 is 'w1', no object with a 'role'; a prompt that is no conversation is one text"
    ):
        read_rows([[{"prompt": ["w1"], "completion": ["w2"]}]])


def test_texts_that_are_lists_of_messages_are_told(tmp_path: Path) -> None:
    texts = [json.dumps(TALK[:1]), json.dumps(TALK[1:])]
    rows = write_rows(tmp_path / "rows.jsonl", [dict(zip(("prompt", "completion"), texts, strict=True))])
    told: list[str] = []
    read_rows(rows, None, None, told.append)
    assert "texts that are lists of messages, read as texts" in told[0]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], [texts[0], "w2"]])
    with pytest.raises(DataError, match="'prompt' is a list of messages, the other is not"):
        read_rows(tmp_path / "a.csv")
