"""What comes from outside: all faults in one line, by the names people know, and nothing that a terminal would obey."""

import json
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, JsonValue

from sculptor import AnalyzeSettings, TrainSettings, analyze
from sculptor.errors import ArchiveError, DataError, SettingsError
from sculptor.methods.kinds import make_method
from sculptor.validation import (
    STRICT,
    AtLeastOne,
    Count,
    FileName,
    Finite,
    Name,
    NotNegative,
    Positive,
    Sha256,
    Texts,
    option,
    parse,
    read_file,
    read_json,
    settings,
    sign,
)

ASCII = [f"a{chr(c)}b" for c in (*range(0x20), 0x7F)]
# The second set of control characters (0x9B is ESC [ to a terminal), and what else ends a line.
WIDE = [f"a{chr(c)}b" for c in (*range(0x80, 0xA0), 0x2028, 0x2029)]


@settings
class Chosen:
    """Settings of this test."""

    batch_size: AtLeastOne = 4
    rate: Positive | None = None
    warm_up: NotNegative = 0.0
    how: Literal["fast", "well"] = "well"
    name: Name = "x"
    files: Texts = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.quiet and self.how == "fast":
            raise SettingsError("--quiet without effect with --how fast")


@dataclass(frozen=True)
class Fact:
    """Facts of this test."""

    __pydantic_config__ = STRICT

    count: Count
    share: Annotated[float, Field(ge=0, le=1)]
    names: tuple[Name, ...] = ()
    digest: Sha256 | None = None
    file: FileName = "a.txt"
    value: Finite = 0.0
    more: Mapping[Name, JsonValue] | None = None


def read(content: Any) -> Fact:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return read_json(Fact, text, "fact.json", ArchiveError, "make it again")


RIGHT: dict[str, Any] = {"count": 3, "share": 0.5}


def test_settings_are_checked_when_they_are_made() -> None:
    assert Chosen().batch_size == 4
    assert Chosen(rate=3).rate == 3.0
    with pytest.raises(FrozenInstanceError):
        Chosen().batch_size = 5  # type: ignore[misc]
    with pytest.raises(SettingsError, match="--batch-size 0: expected at least 1, found 0"):
        Chosen(batch_size=0)


def test_all_faults_are_said_at_once_by_their_options() -> None:
    with pytest.raises(SettingsError) as caught:
        Chosen(batch_size=2.5, rate=-1, warm_up=float("nan"), how="slow", quiet="yes")  # type: ignore[arg-type]
    parts = str(caught.value).split("; ")
    assert [part.split(":")[0] for part in parts] == [
        "--batch-size 2.5",
        "--rate -1",
        "--warm-up nan",
        "--how slow",
        "--quiet yes",
    ]
    assert "expected more than 0.0, found -1" in parts[1]
    assert "expected 'fast' or 'well', found 'slow'" in parts[3]
    assert "expected true or false, found 'yes'" in parts[4]


def test_contradictions_and_unknown_settings_are_said_as_they_are() -> None:
    with pytest.raises(SettingsError) as caught:
        Chosen(quiet=True, how="fast")
    assert str(caught.value) == "--quiet without effect with --how fast"
    with pytest.raises(SettingsError, match="unknown setting 'batch'"):
        Chosen(batch=3)  # type: ignore[call-arg]


def test_options_are_called_as_on_the_command_line() -> None:
    assert option("micro_batch_size") == "--micro-batch-size"


@pytest.mark.parametrize("wrong", [True, "3", 2.5, None, float("inf"), 10**400, -(10**400), [1], {}])
def test_numbers_are_no_other_types(wrong: Any) -> None:
    with pytest.raises(SettingsError, match="--batch-size ") as caught:
        Chosen(batch_size=wrong)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.jsonl", ("a.jsonl",)),
        (Path("b") / "a.jsonl", ("b/a.jsonl",)),
        (["a", Path("b")], ("a", "b")),
        (("a", "b"), ("a", "b")),
        ([], ()),
        ("", ("",)),
    ],
)
def test_texts_take_a_path_a_list_or_one(given: Any, expected: tuple[str, ...]) -> None:
    assert Chosen(files=given).files == expected
    assert TrainSettings(also_train=given).also_train == expected


@pytest.mark.parametrize("given", [3, None, [3], [["a"]], [None], {"a": 1}, b"a", ["x" * 10_001]])
def test_texts_take_nothing_else(given: Any) -> None:
    with pytest.raises(SettingsError, match="--files ") as caught:
        Chosen(files=given)
    assert str(caught.value).isprintable()


def shown(make: Callable[[], object]) -> str:
    """What is said of something, in characters that a terminal only shows; nothing if it is right."""
    try:
        make()
    except (SettingsError, ArchiveError) as error:
        assert str(error).isprintable(), ascii(str(error))
        return str(error)
    return ""


@pytest.mark.parametrize("forms", [ASCII, WIDE], ids=["ascii", "wide"])
def test_control_characters_never_reach_a_message(forms: list[Any]) -> None:
    """From no kind of field, as a name, a value, or a key."""
    for form in forms:
        assert shown(lambda form=form: Chosen(batch_size=form))
        assert shown(lambda form=form: Chosen(how=form))
        assert shown(lambda form=form: Chosen(files=[form, 3]))
        assert shown(lambda form=form: Chosen(**{form: 1}))
        assert shown(lambda form=form: read(RIGHT | {form: 1}))
        assert shown(lambda form=form: read(RIGHT | {"names": [form, 3]}))
        assert shown(lambda form=form: read(RIGHT | {"digest": form}))
        assert shown(lambda form=form: read(RIGHT | {"file": form}))
        assert shown(lambda form=form: read(RIGHT | {"more": {form: {form: 1}}, "share": 3}))
        assert shown(lambda form=form: read(RIGHT | {"count": form}))
        assert shown(lambda form=form: read(json.dumps(RIGHT)[:-1] + f', "{form}'))


@pytest.mark.parametrize("forms", [ASCII, WIDE], ids=["ascii", "wide"])
def test_names_are_one_line_of_text(forms: list[str]) -> None:
    taken = [ascii(form) for form in forms if not shown(lambda form=form: Chosen(name=form))]
    assert taken == []


@pytest.mark.parametrize("forms", [ASCII, WIDE], ids=["ascii", "wide"])
def test_an_unknown_rule_is_named_in_one_line(forms: list[str]) -> None:
    for form in forms:
        assert shown(lambda form=form: make_method(AnalyzeSettings(rule=form)))


@pytest.mark.parametrize("forms", [ASCII, WIDE], ids=["ascii", "wide"])
def test_a_file_given_twice_is_named_in_one_line(forms: list[str]) -> None:
    for form in forms:
        assert shown(lambda form=form: analyze("nowhere", "out", AnalyzeSettings(basis="curvature", data=(form, form))))


def test_facts_are_read_and_what_is_wrong_is_named() -> None:
    assert read(RIGHT) == Fact(3, 0.5)
    assert read(RIGHT | {"more": {"a": [1, {"b": None}]}}).more == {"a": [1, {"b": None}]}
    with pytest.raises(ArchiveError) as caught:
        read({"count": -1, "share": 2, "surprise": 1})
    message = str(caught.value)
    assert message.startswith("fact.json: damaged (")
    assert message.endswith("; make it again")
    for part in (
        "count: expected at least 0, found -1",
        "share: expected at most 1.0, found 2",
        "surprise: is unknown",
    ):
        assert part in message


def test_only_the_first_few_faults_are_listed() -> None:
    with pytest.raises(ArchiveError, match=r"names.3: expected text, found 3; and 16 more.; make it again"):
        read(RIGHT | {"names": list(range(20))})


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"share": 0.5}, "count: is missing"),
        (RIGHT | {"count": "3"}, "count: expected a whole number, found '3'"),
        (RIGHT | {"count": True}, "count: expected a whole number, found True"),
        (RIGHT | {"count": 10**400}, "count: "),
        (RIGHT | {"value": 1e31}, "value: expected at most 1e"),
        (RIGHT | {"names": "abc"}, "names: expected a list, found 'abc'"),
        (RIGHT | {"names": [""]}, "names.0: expected some text, found ''"),
        (RIGHT | {"digest": "A" * 64}, "digest: expected another form"),
        (RIGHT | {"digest": "a" * 64 + "\n"}, "digest: expected another form"),
        (RIGHT | {"file": "../a"}, "file: expected another form"),
        (RIGHT | {"file": ".lock"}, "file: expected another form"),
        (RIGHT | {"file": "a\n"}, "file: expected another form"),
        ([], "content: "),
        ("3", "content: "),
    ],
)
def test_found_against_expected(content: Any, found: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        read(content)
    assert found in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 10**6, '{"a":' * 10**6, '{"count": NaN, "share": 1}', b"\xff", b"\x00"]
)
def test_what_is_no_json_is_one_line(text: str | bytes) -> None:
    with pytest.raises(ArchiveError, match=r"^fact.json: damaged .*make it again$") as caught:
        read(text)
    assert str(caught.value).isprintable()
    with pytest.raises(ArchiveError, match=r"^fact.json: damaged .*make it again$") as caught:
        parse(text if isinstance(text, bytes) else text.encode(), "fact.json", ArchiveError, "make it again")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b'"a"'])
def test_a_plain_object_is_an_object(text: bytes) -> None:
    with pytest.raises(ArchiveError, match="expected a JSON object, found"):
        parse(text, "x", ArchiveError, "make it again")
    assert parse(b'{"a": [1, 2.5, null]}', "x", ArchiveError, "") == {"a": [1, 2.5, None]}


def test_files_that_cannot_be_read_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"{}")
    assert read_file(tmp_path / "a", DataError, "fetch it") == b"{}"
    with pytest.raises(DataError, match=r"none: cannot be read .No such file or directory.; fetch it"):
        read_file(tmp_path / "none", DataError, "fetch it")
    with pytest.raises(DataError, match=r"cannot be read .Is a directory.; fetch it"):
        read_file(tmp_path, DataError, "fetch it")
    monkeypatch.setattr("sculptor.validation.MAX_JSON_BYTES", 1)
    with pytest.raises(DataError, match=r"a: 2 bytes, expected at most 1; fetch it"):
        read_file(tmp_path / "a", DataError, "fetch it")


def test_a_signature_is_of_what_is_said_not_of_how() -> None:
    content = {"b": [1, 2.5, None, "ü"], "a": {"d": True, "c": ""}}
    assert sign(content) == sign(dict(reversed(content.items())))
    assert sign(content) == sign(json.loads(json.dumps(content, indent=3)))
    for change in ({"b": [1, 2.5, None, "u"]}, {"a": {"d": 1, "c": ""}}, {"e": None}):
        assert sign(content | change) != sign(content)
    assert sign({"a": 1}) != sign({"a": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        sign({"a": float("nan")})
