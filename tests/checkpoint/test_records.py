"""sculptor.json as later runs read it: absent, of others, damaged in every way, and how merges are found in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from mutations import mutations

from sculptor.checkpoint.records import RECORD_NAME, MakingRecord, Merge, _Record, read_record
from sculptor.errors import CheckpointError

FULL: dict[str, Any] = {
    "lineage": [
        {"base_digests": {"a": "0" * 64, "b": "1" * 64}, "dtypes": {"a": "bfloat16", "b": "float32"}},
        {"base_digests": {"a": "2" * 64, "b": "3" * 64}, "dtypes": {"a": "float16", "b": "float64"}},
    ],
    "also_trained": ["lm_head.weight"],
    "settings": {"save_dtype": "bfloat16"},
}


def written(path: Path, content: Any) -> Path:
    (path / RECORD_NAME).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_checkpoint_without_one_has_an_empty_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) == MakingRecord()
    (tmp_path / RECORD_NAME).mkdir()
    assert read_record(tmp_path) == MakingRecord(), "a directory of that name is no record"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"method": "lora", "adapter": {"rank": 8}, "settings": {"seed": 3, "save_dtype": "keep"}},
        {"lineage": [], "anything": {"else": [None, 1.5]}},
    ],
)
def test_a_foreign_one_says_nothing(tmp_path: Path, content: Any) -> None:
    assert read_record(written(tmp_path, content)) == MakingRecord()


def test_everything_is_read(tmp_path: Path) -> None:
    found = read_record(written(tmp_path, FULL | {"created_by": "sculptor", "result": {"steps": 3}}))
    assert [merge.base_digests["b"] for merge in found.lineage] == ["1" * 64, "3" * 64]
    assert found.lineage[0].dtypes == {"a": "bfloat16", "b": "float32"}
    assert found.also_trained == ("lm_head.weight",)
    assert found.save_dtype == "bfloat16"
    assert read_record(written(tmp_path, FULL | {"settings": {"save_dtype": "keep"}})).save_dtype is None


def test_every_field_wrong_in_every_way_is_one_line(tmp_path: Path) -> None:
    count = refused = 0
    for what, changed, must_fail in mutations(_Record, FULL, {}):
        count += 1
        written(tmp_path, changed)
        is_more = what.endswith("surprise = 1") or what.startswith("settings = {")  # the rest is for people
        try:
            read_record(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert not is_more, what
            assert str(error).isprintable(), what
            assert len(str(error)) < 1500, what
            assert "restore it, or remove it" in str(error), what
        else:
            assert is_more or not must_fail, what
    assert count > 60
    assert refused > 45


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{", '{"lineage": NaN}', "[" * 100_000, '{"a":' * 100_000, "\x00"]
)
def test_anything_else_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"sculptor.json: damaged .* restore it, or remove it") as caught:
        read_record(written(tmp_path, text))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "", "x" * 2000])
def test_names_are_one_line_of_text(tmp_path: Path, name: str) -> None:
    for content in (
        {"also_trained": [name]},
        {"lineage": [{"base_digests": {name: "0" * 64}, "dtypes": {}}]},
        {"lineage": [{"base_digests": {}, "dtypes": {name: "float32"}}]},
    ):
        with pytest.raises(CheckpointError) as caught:
            read_record(written(tmp_path, content))
        assert str(caught.value).isprintable()


def test_merges_since_a_base_are_told_by_its_digests() -> None:
    first, second = Merge({"a": "0", "b": "1"}, {}), Merge({"a": "2", "b": "3"}, {})
    record = MakingRecord((first, second))
    assert record.merges_since({"a": "0", "b": "1"}) == (first, second)
    assert record.merges_since({"a": "2", "b": "3", "c": "9"}) == (second,)
    assert record.merges_since({"a": "2"}) == (second,), "an archive of fewer matrices"
    assert record.merges_since({"a": "2", "b": "1"}) == ()
    assert record.merges_since({"c": "2"}) == (), "nothing in common is no base"
    assert record.merges_since({}) == ()
    assert MakingRecord().merges_since({"a": "0"}) == ()
