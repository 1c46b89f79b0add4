"""archive.json: what is read is what was written, and everything else is one line."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, slowly, task_rows, write_rows
from mutations import mutations

from sculptor import AnalyzeSettings, Archive, analyze, convert
from sculptor.archive.manifest import Manifest, Rule
from sculptor.archive.writer import ArchiveWriter, _Progress
from sculptor.errors import ArchiveError, OutputError
from sculptor.methods.staircase import StaircaseRule
from sculptor.validation import sign

SWAP = {Rule: StaircaseRule}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an archive with singular directions and one with moments."""
    path = tmp_path_factory.mktemp("manifest")
    save_checkpoint(path / "model")
    rows = write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "model", path / "weights", AnalyzeSettings(preserve=0.5, device="cpu"))
    analyze(path / "model", path / "curvature", AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu"))
    return path


def signed(content: dict[str, Any]) -> bytes:
    """As it would be if it had been written like this; NaN, infinity and numbers without end as text has them."""
    try:
        return json.dumps(content | {"sha256": sign(content)}).encode()
    except ValueError:
        return json.dumps(content | {"sha256": "0" * 64}).encode()


@pytest.mark.parametrize(("basis", "every"), [("weights", 7), *slowly(("weights", 1), ("curvature", 1))])
def test_every_field_wrong_in_every_way_is_one_line(made: Path, basis: str, every: int) -> None:
    content = json.loads((made / basis / "archive.json").read_text())
    content.pop("sha256")
    count = 0
    for what, changed, must_fail in mutations(Manifest, content, SWAP):
        count += 1
        if count % every:
            continue
        try:
            Manifest.from_json(signed(changed), "archive.json")
        except ArchiveError as error:
            assert "\n" not in str(error), what
            assert str(error).isprintable(), what
            assert len(str(error)) < 1500, what
        else:
            assert not must_fail, what
    assert count > 400


@pytest.mark.slow
@pytest.mark.parametrize("every", [7, *slowly(1)])
def test_progress_of_an_analysis_is_checked_too(made: Path, every: int, tmp_path: Path) -> None:
    archive = Archive(made / "weights")
    content = {
        "key": {"a": 1},
        "shards": list(archive.manifest.files),
        "records": json.loads(json.dumps(archive.manifest.to_json()))["matrices"],
        "tensors": archive.manifest.to_json()["tensors"],
    }
    writer = ArchiveWriter(tmp_path, torch.float32, {"a": 1})
    found = mutations(_Progress, json.loads(json.dumps(content)), SWAP)
    for what, changed, must_fail in itertools.islice(found, 0, None, every):
        (tmp_path / "progress.json").write_text(json.dumps(changed))
        try:
            writer.resume()
        except OutputError as error:
            assert "\n" not in str(error), what
        else:
            assert not must_fail, what


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "damaged"),
        (b'{"a":' * 100_000, "damaged"),
        (b"[]", "expected a JSON object, found list"),
        (b"\xff\xfe", "damaged"),
        (b'{"format": "sculptor-subspaces", "version": 3, "x": NaN}', "damaged"),
        (b'{"format": "sculptor-subspaces", "version": 2}', "damaged manifest of version 2"),
        (b'{"format": "sculptor-subspaces", "version": "3"}', "archive version '3'"),
    ],
)
def test_anything_else_is_one_line(text: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=message) as caught:
        Manifest.from_json(text, "archive.json")
    assert "\n" not in str(caught.value)


def version2(archive: Archive, path: Path) -> None:
    """The same archive as the format's second version had it."""

    def side(record: dict[str, Any], name: str) -> dict[str, Any] | None:
        found, tensors = record["rule"][name], record["tensors"]
        if found is None:
            return None
        extra = {key: tensors.get(f"{name}.{key}") for key in ("values", "profiles")}
        return found | {"tensor": tensors[name]} | extra

    content = json.loads((archive.path / "archive.json").read_text())
    settings, method = content["settings"], archive.method
    settings["steps"] = settings.pop("row_groups")
    settings.pop("rule")
    matrices = {}
    for name, record in content["matrices"].items():
        rule = record["rule"]
        same = ("parameter", "block", "index", "role", "transposed", "input_group", "base_dtype", "base_digest")
        facts = ("shape", "steps", "retention", "importance", "energy", "added", "traces")
        matrices[name] = (
            {key: record[key] for key in same}
            | {key: rule[key] for key in facts}
            | {
                "name": record["tensor"],
                "output": side(record, "output"),
                "input": side(record, "input"),
                "spectrum": record["tensors"].get("spectrum"),
            }
        )
    tasks = [
        {
            "name": task["name"],
            "kind": task["kind"],
            "details": task["details"]
            | ({"weights": task["weights"], "calibration": task["calibration"]} if task["weights"] else {}),
        }
        for task in content["tasks"]
    ]
    old = {key: content[key] for key in ("format", "created_by", "model_class", "base_identity", "tensors", "files")}
    old |= {"version": 2, "basis": method.terms.basis, "constraint": method.terms.constraint, "settings": settings}
    old |= {"tasks": tasks, "matrices": matrices, "not_targeted": content["not_targeted"]}
    path.mkdir()
    for file in content["files"]:
        (path / file).write_bytes((archive.path / file).read_bytes())
    (path / "archive.json").write_text(json.dumps(old))


@pytest.mark.parametrize("basis", ["weights", "curvature"])
def test_version_2_is_read_trained_with_and_converted(made: Path, basis: str, tmp_path: Path) -> None:
    from sculptor import TrainSettings, train, verify

    new = Archive(made / basis)
    version2(new, tmp_path / "old")
    old = Archive(tmp_path / "old")
    for name, record in new.items():
        assert old[name].rule == record.rule
        assert old[name].tensors == record.tensors
        assert old[name].base_rms is None
    converted = convert(tmp_path / "old", tmp_path / "converted", model=made / "model")
    assert dict(converted) == dict(new)
    assert converted.manifest.to_json()["version"] == 3
    settings = TrainSettings(max_steps=2, device="cpu")
    for which in ("old", "converted"):
        train(made / "model", tmp_path / which, [made / "rows.jsonl"], tmp_path / f"t-{which}", settings)
    one, two = ((tmp_path / f"t-{which}" / "model.safetensors").read_bytes() for which in ("old", "converted"))
    assert one == two
    assert json.loads((tmp_path / "t-old" / "subspaces" / "archive.json").read_text())["version"] == 3
    assert verify(made / "model", tmp_path / "t-old", tmp_path / "old", device="cpu").passed


def test_sections_are_kept_with_their_digests(made: Path, tmp_path: Path) -> None:
    archive = Archive(made / "weights")
    entries = [archive.read(name) for name in archive]
    from sculptor.methods.method import Derived

    writer = ArchiveWriter(tmp_path, torch.float32, {})
    for entry in entries:
        writer.add(entry.record, Derived(entry.rule, entry.tensors))
    writer.add_section("samples", b"some of its own words", ".jsonl")
    writer.finish(archive.manifest)
    again = Archive(tmp_path)
    assert again.section("samples") == b"some of its own words"
    assert again.section("optimizer") is None
    assert again.manifest.sections["samples"].sha256 == hashlib.sha256(b"some of its own words").hexdigest()
    (tmp_path / "samples.jsonl").write_bytes(b"SOME of its own words")
    with pytest.raises(ArchiveError, match=r"samples.jsonl: has changed since it was written"):
        Archive(tmp_path).section("samples")
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(ArchiveError, match=r"samples.jsonl: is missing"):
        Archive(tmp_path)
