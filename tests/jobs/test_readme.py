"""The model card of every output: read as the hub reads it, and without a place on anybody's machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows
from edited import save_adapter, save_tuned
from huggingface_hub import ModelCard, metadata_load

from sculptor import AnalyzeSettings, Archive, analyze, verify
from sculptor.checkpoint.directory import published_name
from sculptor.jobs.readme import Readme, code, write_readme

OF_THE_BASE = """---
license: other
license_name: small-license
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
base_model: somebody/else
widget:
- text: hello
---

# The `small` | model

Words.
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a card and a place in its configuration, its archive, a fine-tune with another licence, rows."""
    path = tmp_path_factory.mktemp("card")
    base = save_checkpoint(path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": str(path / "earlier")}))
    save_tuned(base, path / "tuned")
    (base / "README.md").write_text(OF_THE_BASE)
    (path / "tuned" / "README.md").write_text("---\nlicense: mit\n---\n")
    write_rows(path / "task.jsonl", task_rows())
    write_rows(path / "text.jsonl", task_rows("text"))
    curvature = AnalyzeSettings(basis="curvature", data=(str(path / "text.jsonl"),), device="cpu")
    analyze(base, path / "archive", curvature)
    return path


def train(cli: Callable[..., Result], model: Path, archive: Path, made: Path, output: Path, *more: object) -> None:
    steps = ("--max-steps", 2, "--device", "cpu")
    found = cli("train", model, "--subspaces", archive, "--data", made / "task.jsonl", "-o", output, *steps, *more)
    assert found.code == 0, found.err


def head_of(output: Path) -> dict[str, Any]:
    found = metadata_load(output / "README.md")
    assert found == ModelCard.load(output / "README.md", ignore_metadata_errors=False).data.to_dict()
    assert found is not None
    return found


def check_places(output: Path, *places: Path) -> None:
    """No file says where anything was."""
    files = [file for file in output.rglob("*") if file.is_file()]
    assert len(files) > 4
    told = [file.name for file in files for place in places if str(place).encode() in file.read_bytes()]
    assert told == []


def test_of_a_training(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }} <end> {% endfor %}")
    write_rows(
        tmp_path / "chats.jsonl",
        [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}] * 2,
    )
    out, more = tmp_path / "out", ("--chat-template", template, "--data", tmp_path / "chats.jsonl")
    train(cli, made / "base", made / "archive", made, out, *more)
    head = head_of(out)
    assert head == {
        "base_model": "base",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "small-license",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["sculptor", "continual-learning"],
    }
    text = (out / "README.md").read_text(encoding="utf-8")
    record = json.loads((out / "sculptor.json").read_text())
    result = record["result"]
    assert f"{result['first_loss']:.4f}, {result['last_loss']:.4f} nats" in text
    assert f"| {max(each['leak'] for each in record['matrices'].values()):.1e} of its update |" in text
    assert all(words in text for words in ("`task.jsonl`", "`chats.jsonl`", record["data"]["rows_sha256"]))
    assert "* Made from `base`, `The small ¦ model`: licence `small-license`." in text
    assert "Words." not in text
    assert "sculptor verify BASE THIS --subspaces ARCHIVE" in text
    archive = Archive(made / "archive")
    total = sum(record.shape[0] * record.shape[1] for record in archive.values())
    assert f"{100 * (1 - archive.num_free / total):.1f} % of {total:,} parameters" in text
    assert archive.identity in text
    assert verify(made / "base", out, made / "archive", device="cpu").passed
    check_places(out, made, tmp_path)


def test_a_second_training_names_the_first_base(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    """A folder of ours is on no hub; what it was made of may be."""
    train(cli, made / "base", made / "archive", made, tmp_path / "one")
    text = (tmp_path / "one" / "README.md").read_text().replace("base_model: base", "base_model: somebody/small")
    (tmp_path / "one" / "README.md").write_text(text)
    train(cli, tmp_path / "one", tmp_path / "one" / "subspaces", made, tmp_path / "two")
    assert head_of(tmp_path / "two")["base_model"] == "somebody/small"
    assert "# `one`, taught `task.jsonl`" in (tmp_path / "two" / "README.md").read_text()
    check_places(tmp_path / "two", made, tmp_path)


@pytest.mark.parametrize("command", ["interpolate", "lines", "project", "threshold"])
def test_of_an_edit(cli: Callable[..., Result], made: Path, tmp_path: Path, command: str) -> None:
    more = {"interpolate": ("--alpha", 0.5), "lines": ("--alpha", 0.5), "project": ("--subspaces", made / "archive")}
    place = ("-o", tmp_path / "out", "--device", "cpu")
    found = cli("edit", command, made / "base", made / "tuned", *more.get(command, ()), *place)
    assert found.code == 0, found.err
    head = head_of(tmp_path / "out")
    assert head["base_model"] == ["base", "tuned"]
    assert "license" not in head  # the two say different things
    text = (tmp_path / "out" / "README.md").read_text()
    assert "licence `small-license`" in text
    assert "licence `mit`" in text
    assert ("sculptor verify" in text) == (command == "project")
    check_places(tmp_path / "out", made, tmp_path)


def test_of_an_edit_with_an_adapter_and_of_pruning(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    save_adapter(made / "base", tmp_path / "adapter")
    found = cli("edit", "interpolate", made / "base", tmp_path / "adapter", "--alpha", 0.5, "-o", tmp_path / "a")
    assert found.code == 0, found.err
    found = cli(
        "edit", "prune", made / "base", "--sparsity", 0.3, "--subspaces", made / "archive", "-o", tmp_path / "p"
    )
    assert found.code == 0, found.err
    for output in (tmp_path / "a", tmp_path / "p"):
        assert (head_of(output)["base_model"], head_of(output)["license"]) == ("base", "other")
        check_places(output, made, tmp_path)
    assert "removed of the curvature" in (tmp_path / "p" / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("", None),
        ("---\n: [\n---\n# Title\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: [mit, 3]\n---\n", None),
        ("---\nlicense: mit\nlicense_link: /home/me/LICENSE\n---\n", "mit"),
        ("---\nlicense: mit\nlicense_link: file:///home/me\nlanguage: {a: /home/me}\n---\n", "mit"),
        ("\ufeff---\nlicense: apache-2.0\n---\n", "apache-2.0"),
    ],
)
def test_cards_of_bases_may_be_anything(tmp_path: Path, text: str, licence: str | None) -> None:
    base, staged = tmp_path / "no hub-name", tmp_path / "staged"
    for folder in (base, staged):
        folder.mkdir()
        (folder / "README.md").write_text(text, encoding="utf-8")
    (staged / "readme.MD").write_text("of the base")
    write_readme(staged, Readme(bases=(base,), done="changed", summary="So it is.", tags=(), figures=[("a", "1")]))
    head = head_of(staged)
    assert head.get("license") == licence
    assert "base_model" not in head  # the hub has no such names
    assert "/home/me" not in (staged / "README.md").read_text()
    assert sorted(path.name for path in staged.iterdir()) == ["README.md"]


def test_a_card_that_is_a_link_out_is_not_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "mine.md").write_text("---\nlicense: mit\n---\n# Secret\n")
    (base / "README.md").symlink_to(tmp_path / "mine.md")
    (tmp_path / "staged").mkdir()
    write_readme(tmp_path / "staged", Readme(bases=(base,), done="x", summary="x", tags=(), figures=[]))
    assert "Secret" not in (tmp_path / "staged" / "README.md").read_text()


def test_data_on_the_hub_and_names_with_marks(tmp_path: Path) -> None:
    base, staged = tmp_path / "base", tmp_path / "staged"
    for folder in (base, staged):
        folder.mkdir()
    data = ("owner/name:config@train", "task.jsonl", "owner/name@test", "a`|b\n---\n.jsonl")
    write_readme(staged, Readme(bases=(base,), done="x", summary="x", tags=("t",), figures=[], data=data))
    assert head_of(staged) == {
        "base_model": "base",
        "datasets": ["owner/name"],
        "library_name": "transformers",
        "tags": ["sculptor", "t"],
    }
    assert "* `a'¦b --- .jsonl`" in (staged / "README.md").read_text()
    assert code("a\tb`") == "`a b'`"


def test_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    place = tmp_path / "models--owner--some-name" / "snapshots" / "0123abc"
    place.mkdir(parents=True)
    assert published_name(place) == "owner/some-name"
    (tmp_path / "link").symlink_to(place)
    assert published_name(tmp_path / "link") == "owner/some-name"
    assert published_name(tmp_path) == tmp_path.name
