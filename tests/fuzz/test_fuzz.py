"""Damaged files of every kind: no traceback, nothing that takes long or much memory, nothing written elsewhere.

Some dozens of cases each by default; `pytest -m slow tests/fuzz` takes 100,000 in all. `bytes.py` beside this does the same guided
by coverage, with atheris (`pip install 'sculptor-subspaces[fuzz]'`).
"""

import contextlib
import copy
import json
import random
import resource
import warnings
from typing import Any

import pytest
from fuzz.readers import Reader, make_readers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sculptor.validation import sign

NAMES = [
    "header", "index", "config", "manifest", "record", "state", "plan", "rows", "samples", "tokenizer", "adapter",
    "adapter weights", "options", "record of options",
]  # fmt: skip
# What is no JSON document, but bytes or lines.
PLAIN = ("header", "plan", "rows", "samples", "adapter weights", "options")
# Of those that take their time: a model is built, or an archive opened.
FEW = ("config", "tokenizer", "samples")
WRONG: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 5000, "../../etc/passwd", "/dev/zero",
    "\x1b[2J\u202e\x00", [], {}, [[]], {"a": {}}, "bfloat16", 1.5,
]  # fmt: skip
MEMORY = 2_000_000  # kB


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return make_readers(tmp_path_factory.mktemp("fuzz"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def damaged_json(sound: bytes, choose: random.Random) -> bytes:
    """A document with a few values replaced, removed, renamed or nested."""
    content = json.loads(sound)
    for _ in range(choose.randint(1, 3)):
        known = places(content)
        if not known:
            break
        *way, last = choose.choice(known)
        holder = content
        for key in way:
            holder = holder[key]
        kind = choose.randrange(4)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(choose.choice(WRONG))[:100]] = holder.pop(last)
        elif kind == 2:
            holder[last] = [holder[last]]
        else:
            holder[last] = copy.deepcopy(choose.choice(WRONG))  # else what is nested into it stays in the list
    if (
        isinstance(content, dict) and "sha256" in content and choose.random() < 0.8
    ):  # else the signature stops everything
        with contextlib.suppress(ValueError):
            content.pop("sha256")
            content["sha256"] = sign(content)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def damaged_bytes(sound: bytes, choose: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled or cut off."""
    content = bytearray(sound)
    for _ in range(choose.randint(1, 6)):
        at = choose.randrange(min(len(content), 4096) or 1) if content else 0
        kind = choose.randrange(5)
        if kind == 0 and content:
            content[at] = choose.randrange(256)
        elif kind == 1:
            del content[at : at + choose.randint(1, 64)]
        elif kind == 2:
            content[at:at] = content[at : at + choose.randint(1, 64)]
        elif kind == 3:
            del content[at:]
        else:
            content[at:at] = bytes(choose.randrange(256) for _ in range(8))
    return bytes(content)


def check(reader: Reader, name: str, examples: int) -> None:
    root = reader.file.parent
    before = sorted(item.name for item in root.iterdir())

    @settings(
        max_examples=examples, deadline=60_000, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(st.integers(0, 2**32), st.binary(max_size=300)))
    def run(case: Any) -> None:
        if isinstance(case, bytes):
            content = case
        else:
            choose = random.Random(case)
            as_json = name not in PLAIN and choose.random() < 0.7
            content = (damaged_json if as_json else damaged_bytes)(reader.sound, choose)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.try_bytes(content)

    run()
    assert sorted(item.name for item in root.iterdir()) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MEMORY


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_one_line(readers: dict[str, Reader], name: str) -> None:
    assert readers[name].try_bytes(readers[name].sound) is None
    check(readers[name], name, 15 if name in FEW else 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_one_line_at_length(readers: dict[str, Reader], name: str) -> None:
    check(readers[name], name, 3_000 if name in FEW else 8_300)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PLAIN])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"[1", b"null", b'"x"', b"\xff\xfe", b""])
def test_depth_and_other_documents(readers: dict[str, Reader], name: str, content: bytes) -> None:
    assert readers[name].try_bytes(content) is not None


def test_rows_of_any_depth_and_size(readers: dict[str, Reader]) -> None:
    for content in (
        b"[" * 100_000,
        b'{"text":' * 100_000,
        b'{"text": ' + b"9" * 10_000 + b"}",
        b"\x00" * 50,
        b"\n" * 50,
    ):
        assert readers["rows"].try_bytes(content) is not None


def test_a_plan_with_a_nul_in_a_path(readers: dict[str, Reader]) -> None:
    plan = readers["plan"]
    for content in (
        plan.sound.replace(b'"rows.jsonl"', b'"ro\\u0000ws"'),
        plan.sound.replace(b'"model"', b'"m\\u0000"', 1),
    ):
        line = plan.try_bytes(content)
        assert line is None or "\x00" not in line
