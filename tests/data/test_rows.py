"""Rows by their keys, and faults by file and line."""

from pathlib import Path

import pytest
from conftest import task_rows, write_rows

from sculptor.data.rows import CompletionRow, MessagesRow, TextRow, given_twice, read_rows
from sculptor.errors import DataError


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    jsonl, text = tmp_path / "rows.jsonl", tmp_path / "plain.txt"
    jsonl.write_text(
        '{"text": "a\u2028b"}\n\n{"prompt": "p", "completion": "c", "id": 3}\n'
        '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}\n',
        encoding="utf-8",
    )
    text.write_text("one\ntwo\n")
    rows = read_rows([jsonl, text])
    assert [type(row) for row in rows] == [TextRow, CompletionRow, MessagesRow, TextRow]
    assert rows[1].where == f"{jsonl}:3"
    assert rows[3] == TextRow(str(text), "one\ntwo\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "broken JSON"),
        ("[" * 100000, "broken JSON .nested too deeply"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ("[1]", "expected a JSON object, found list"),
        ('{"question": "x"}', "keys 'question'; expected"),
        ('{"prompt": "x"}', "keys 'prompt'; expected"),
        ('{"text": 3}', "'text' is int"),
        ('{"prompt": "x", "completion": " "}', "empty completion"),
        ('{"messages": []}', "not a list of messages"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no 'content' and no 'tool_calls'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_rows([path])
    assert str(caught.value).startswith(f"{path}:2: ")


def test_missing_empty_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows([tmp_path / "nothing.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        read_rows([tmp_path / "empty.jsonl"])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not readable as UTF-8"):
        read_rows([tmp_path / "binary.jsonl"])


def test_what_is_given_twice_whatever_its_weight_or_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "t.jsonl", task_rows(count=2))
    assert given_twice(["a/t.jsonl", "b/t.jsonl", "self"]) is None
    assert given_twice([task_rows(), task_rows()]) is None, "rows that are in memory have no place"
    for twice in ("./a/t.jsonl", "b/../a/t.jsonl", "a/t.jsonl:2", str(tmp_path / "a" / "t.jsonl")):
        assert given_twice(["a/t.jsonl", twice]) == twice.removesuffix(":2")
    assert given_twice(["self:1", "self:2"]) == "self"
