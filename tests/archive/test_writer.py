"""Writing archives: what is stored once, in which dtype, what is taken up again, and what is said of a damaged note."""

import json
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from torch import Tensor

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.archive.shards import Shard, save_tensors
from sculptor.archive.store import Entry
from sculptor.archive.writer import PROGRESS_NAME, ArchiveWriter, has_progress
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.tensors import read_header, read_tensor
from sculptor.checkpoint.written import MARKER_NAME, begin, note
from sculptor.errors import OutputError
from sculptor.methods.method import Derived
from sculptor.methods.settings import BasisDtype
from sculptor.numerics.linalg import principal_angles, singular_subspaces

COVERS = ["sculptor.archive.shards"]
SHARED = frozenset({"input", "input.values", "input.profiles"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an archive with moments, whose inputs are shared."""
    path = tmp_path_factory.mktemp("writer")
    save_checkpoint(path / "model")
    rows = write_rows(path / "rows.jsonl", task_rows())
    analyze(path / "model", path / "archive", AnalyzeSettings(basis="curvature", data=(str(rows),), device="cpu"))
    return path


def entries(archive: Archive) -> list[Entry]:
    return [archive.read(name) for name in archive]


def filled(archive: Archive, directory: Path, count: int = 14, **options: object) -> ArchiveWriter:
    """A writer of some matrices of an archive, under other input groups that are the same ones."""
    directory.mkdir(exist_ok=True)
    arguments = {"dtype": torch.float32, "key": {"a": 1}} | options
    writer = ArchiveWriter(directory, **arguments)  # type: ignore[arg-type]
    writer.resume()
    for found in entries(archive)[:count]:
        if found.record.name not in writer.records:
            writer.add(found.record, Derived(found.rule, found.tensors, SHARED))
    return writer


@pytest.mark.parametrize("size", [1, 5_000, 2**30])
def test_shards_hold_everything_whatever_their_size(made: Path, size: int, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    filled(archive, tmp_path / "a", max_shard_bytes=size).finish(archive.manifest)
    again = Archive(tmp_path / "a")
    assert dict(again) == dict(archive)
    assert len(again.manifest.files) == {1: 14, 5_000: len(again.manifest.files), 2**30: 1}[size]
    assert len(again.manifest.files) > 1 or size == 2**30
    assert sorted(path.name for path in again.path.iterdir()) == sorted(["archive.json", *again.manifest.files])
    for found, expected in zip(entries(again), entries(archive), strict=True):
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name], tensor)
    assert again.manifest.base_identity == archive.manifest.base_identity


@pytest.mark.parametrize("size", [1, 2**30])
def test_what_matrices_share_is_stored_once(made: Path, size: int, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    filled(archive, tmp_path / "a", max_shard_bytes=size).finish(archive.manifest)
    again = Archive(tmp_path / "a")
    readers = Counter(record.tensors["input"] for record in again.values())
    assert sorted(readers.values()) == [1, 1, 1, 1, 2, 2, 3, 3], "q, k, v read one input, gate and up another"
    stored = [name for file in again.manifest.files for name in read_header(again.path / file, OutputError)[0]]
    assert len(stored) == len(set(stored)) == len(again.manifest.tensors)
    assert sum(name.endswith(".input") for name in stored) == len(readers) == 8
    for record in again.values():
        assert record.tensors["input"] == f"{record.input_group}.input"
        assert record.tensors["output"] == f"{record.name}.output"


def test_what_is_not_shared_is_stored_for_each(made: Path, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    writer = ArchiveWriter(tmp_path, torch.float32, {})
    for found in entries(archive):
        writer.add(found.record, Derived(found.rule, found.tensors))
    writer.finish(archive.manifest)
    assert sum(name.endswith(".input") for name in Archive(tmp_path).manifest.tensors) == 14


@pytest.mark.parametrize("size", [1, 5_000, 2**30])
def test_facts_may_follow_later(made: Path, size: int, tmp_path: Path) -> None:
    """Whether the matrix waits, is being written or is in a shard already; its tensors stay."""
    archive = Archive(made / "archive")
    writer = filled(archive, tmp_path / "a", max_shard_bytes=size)
    for record in writer.all_records():
        assert writer.record(record.name) == record
        writer.update(replace(record, base_rms=0.125))
        assert writer.record(record.name).base_rms == 0.125
    assert {record.name for record in writer.all_records()} == set(archive)
    writer.finish(archive.manifest)
    again = Archive(tmp_path / "a")
    assert {record.base_rms for record in again.values()} == {0.125}
    assert list(again) == list(archive), "in the order of the manifest"
    for found, expected in zip(entries(again), entries(archive), strict=True):
        assert torch.equal(found.tensors["output"], expected.tensors["output"])


@pytest.mark.parametrize("size", [1, 2**30])
def test_what_was_added_can_be_read_before_the_end(made: Path, size: int, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    writer = filled(archive, tmp_path / "a", max_shard_bytes=size)
    for record in writer.all_records():
        expected = archive.read(record.name).tensors
        for name, stored in record.tensors.items():
            assert torch.equal(writer.read(stored), expected[name])
    with pytest.raises(KeyError):
        writer.record("no such matrix")
    writer.close()


def test_the_manifest_gives_the_order(made: Path, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    writer = ArchiveWriter(tmp_path, torch.float32, {}, max_shard_bytes=1)
    for found in reversed(entries(archive)):
        writer.add(found.record, Derived(found.rule, found.tensors, SHARED))
    writer.finish(archive.manifest)
    assert list(Archive(tmp_path)) == list(archive)


def test_an_archive_is_kept_bit_for_bit(made: Path, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    writer = ArchiveWriter(tmp_path, torch.bfloat16, {}, max_shard_bytes=5_000)
    for record in archive.values():
        writer.keep(record, archive)
    writer.finish(archive.manifest)
    again = Archive(tmp_path)
    sha256 = {name: stored.sha256 for name, stored in archive.manifest.tensors.items()}
    assert {name: stored.sha256 for name, stored in again.manifest.tensors.items()} == sha256
    assert dict(again) == dict(archive)


@pytest.mark.parametrize("count", [0, 5, 13])
def test_the_same_key_goes_on_behind_the_last_shard(made: Path, count: int, tmp_path: Path) -> None:
    archive, cut = Archive(made / "archive"), tmp_path / "cut.partial"
    cut.mkdir()
    begin(cut, "analyze")
    filled(archive, tmp_path / "whole", max_shard_bytes=5_000).finish(archive.manifest)
    filled(archive, cut, count, max_shard_bytes=5_000).close()
    assert has_progress(cut) == (count > 0)
    (cut / "left-over").mkdir()
    for name, content in (("subspaces-00099.safetensors", b"of another run"), ("subspaces-mine.safetensors", b"")):
        (cut / name).write_bytes(content)
    note(cut / "subspaces-00099.safetensors")
    again = filled(archive, cut, max_shard_bytes=5_000)
    again.finish(archive.manifest)
    assert not has_progress(cut)
    (cut / "subspaces-mine.safetensors").unlink()  # which is not touched
    whole, found = ({f.name: f.read_bytes() for f in path.iterdir()} for path in (tmp_path / "whole", cut))
    assert found.pop(MARKER_NAME)
    assert whole == found


def test_another_key_is_refused_and_names_what_differs(made: Path, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    key = {"settings": {"seed": 0}, "base": "x", "data": []}
    filled(archive, tmp_path / "a", 5, key=key, max_shard_bytes=1).close()
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for change, named in (({"base": "y"}, "base"), ({"settings": {"seed": 1}, "data": [1]}, "data, settings")):
        with pytest.raises(
            OutputError, match=rf"other inputs or settings .{named}; .*use the same or pass --overwrite"
        ):
            ArchiveWriter(tmp_path / "a", torch.float32, key | change).resume()
        assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before, "and nothing is lost"
    again = ArchiveWriter(tmp_path / "a", torch.float32, dict(reversed(key.items())))
    again.resume()
    assert len(again.records) == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"key": NaN}', "[" * 100_000, "\x00", '{"key": {}}'])
def test_a_damaged_note_is_one_line(made: Path, text: str, tmp_path: Path) -> None:
    filled(Archive(made / "archive"), tmp_path / "a", 5, max_shard_bytes=1).close()
    (tmp_path / "a" / PROGRESS_NAME).write_text(text)
    with pytest.raises(OutputError, match=r"progress.json: damaged .*pass --overwrite to start anew") as caught:
        ArchiveWriter(tmp_path / "a", torch.float32, {"a": 1}).resume()
    assert str(caught.value).isprintable()
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 5


def test_after_close_nothing_is_written_any_more(made: Path, tmp_path: Path) -> None:
    archive = Archive(made / "archive")
    writer = filled(archive, tmp_path / "a", 3, max_shard_bytes=1)
    writer.close()
    before = sorted((tmp_path / "a").iterdir())
    with pytest.raises(RuntimeError):
        writer.finish(archive.manifest)
    assert sorted((tmp_path / "a").iterdir()) == before


def test_a_disk_that_fills_up_is_one_line(made: Path, tmp_path: Path, small_disk: None) -> None:
    archive = Archive(made / "archive")
    writer = filled(archive, tmp_path / "a", max_shard_bytes=2**30)
    with pytest.raises(OutputError, match="cannot write"):
        writer.finish(archive.manifest)
    writer.close()
    assert not (tmp_path / "a" / "archive.json").exists()
    assert not list((tmp_path / "a").glob("*.safetensors"))


def span(basis: Tensor) -> Tensor:
    """The projector on the columns, float64, by a QR of this test's own."""
    q = torch.linalg.qr(basis.double())[0]
    return q @ q.T


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_bases_are_stored_in_the_dtype_asked_for_and_read_orthonormal(
    made: Path, dtype: BasisDtype, tmp_path: Path
) -> None:
    analyze(made / "model", tmp_path / "a", AnalyzeSettings(preserve=0.4, dtype=dtype, device="cpu"))
    archive, checkpoint = Archive(tmp_path / "a"), open_checkpoint(made / "model")
    wide = torch.float64 if dtype == "float64" else torch.float32
    exact = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 1e-6}[dtype]
    near = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 0.05}[dtype]
    for name, record in archive.items():
        k = round(0.4 * min(record.shape))
        found = singular_subspaces(checkpoint[name], k)
        for side, reference in (("output", found.left), ("input", found.right)):
            place = archive.path / archive.manifest.tensors[record.tensors[side]].file
            stored = read_tensor(place, record.tensors[side], OutputError)
            assert stored.dtype == getattr(torch, dtype)
            basis = archive.basis(record.tensors[side])
            assert basis.dtype == wide
            count = basis.shape[1]
            assert basis.shape == stored.shape
            gram = basis.double().T @ basis.double()
            assert float((gram - torch.eye(count, dtype=torch.float64)).abs().max()) < exact
            for j in (1, count // 2, count):  # prefix by prefix: order is what a staircase relies on
                assert float((span(basis[:, :j]) - span(stored[:, :j])).abs().max()) < 1e-6
            if count == k != basis.shape[0] - k:  # the protected ones themselves, not all the others
                assert float(principal_angles(basis, reference).max()) < near
        assert archive.read(name).tensors["spectrum"].dtype == torch.float32, "whatever the dtype of bases"


def test_a_file_is_complete_or_not_there(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {"b": torch.randn(3, 4, generator=generator), "a": torch.arange(5)}
    save_tensors(tensors, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(tmp_path / "x.safetensors", name, OutputError), tensor)
    with pytest.raises(OutputError, match="cannot write"):
        save_tensors(tensors, tmp_path / "nowhere" / "x.safetensors")


def test_notes_are_what_is_in_the_shards(made: Path, tmp_path: Path) -> None:
    filled(Archive(made / "archive"), tmp_path / "a", 5, max_shard_bytes=1).close()
    note = json.loads((tmp_path / "a" / PROGRESS_NAME).read_text())
    assert note["key"] == {"a": 1}
    assert note["shards"] == [f"subspaces-{i:05d}.safetensors" for i in range(1, 6)]
    inside = {name: file for file in note["shards"] for name in read_header(tmp_path / "a" / file, OutputError)[0]}
    assert {name: stored["file"] for name, stored in note["tensors"].items()} == inside


def test_nothing_is_noted_behind_a_shard_that_is_missing(made: Path, tmp_path: Path) -> None:
    """What comes after may share its tensors."""
    archive = Archive(made / "archive")
    writer = filled(archive, tmp_path / "a", 3, max_shard_bytes=1)
    writer.all_records()
    lost: Future[Shard] = Future()
    writer.take(lost)
    writer.take(Shard(None, {}, {record.name: record for record in list(archive.values())[3:]}))
    lost.set_exception(OutputError("no room"))
    with pytest.raises(OutputError, match="no room"):
        writer.all_records()
    writer.close()
    assert len(json.loads((tmp_path / "a" / PROGRESS_NAME).read_text())["records"]) == 3
