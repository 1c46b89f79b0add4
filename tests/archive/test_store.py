"""Archives: round trip, laziness, and every check on opening and reading."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, analyze
from sculptor.archive.store import Archive
from sculptor.archive.writer import ArchiveWriter, save_tensors
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.tensors import digest
from sculptor.errors import ArchiveError, OutputError
from sculptor.numerics.bases import protected_directions

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


@pytest.fixture
def path(tmp_path: Path, model: Path) -> Path:
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.75, device="cpu"))
    return tmp_path / "archive"


def test_stored_directions_are_the_leading_singular_vectors(path: Path, model: Path) -> None:
    archive, checkpoint = Archive(path), open_checkpoint(model)
    for name, record in archive.items():
        k = int(0.75 * min(record.shape))
        u, s, vh = torch.linalg.svd(checkpoint[name].double())
        found = archive.read(name)
        for side, reference in ((found.output, u[:, :k]), (found.input, vh[:k].T)):
            assert side is not None
            assert side.directions == k
            assert side.vectors.dtype == torch.float32
            assert 2 * side.vectors.shape[1] <= side.dim  # the smaller of the two forms
            span = protected_directions(side).double()
            assert torch.linalg.matrix_norm(span @ span.T - reference @ reference.T, 2) < 1e-6
        assert record.energy == pytest.approx(float(s[:k].square().sum() / s.square().sum()), rel=1e-9)
        torch.testing.assert_close(archive.spectrum(name), s.float(), atol=1e-5, rtol=1e-5)


def test_others_may_read_every_file_of_an_archive(path: Path) -> None:
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_manifest_survives_json(path: Path) -> None:
    manifest = Archive(path).manifest
    assert type(manifest).from_json(json.loads(json.dumps(manifest.to_json())), path) == manifest


def edit(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((path / "archive.json").read_text())
    change(content)
    (path / "archive.json").write_text(json.dumps(content))


def shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def rewrite(path: Path, change: Callable[[torch.Tensor], torch.Tensor], *, with_digest: bool) -> None:
    key = f"{NAME}.input"
    tensors = load_file(shard(path))
    tensors[key] = change(tensors[key]).contiguous()
    save_tensors(tensors, shard(path))
    if with_digest:
        edit(path, lambda c: c["tensors"][key].update(sha256=digest(tensors[key])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "not a subspace archive"),
        (lambda c: c.update(version=99), "archive version 99, this sculptor reads version 2"),
        (lambda c: c.pop("matrices"), "damaged manifest"),
        (lambda c: c["matrices"][NAME].update(steps=[[3, 1]]), "damaged manifest .*steps"),
        (lambda c: c["matrices"][NAME].update(surprise=1), "damaged manifest"),
        (lambda c: c.update(constraint="triple"), "constraint 'triple' is unknown"),
        (lambda c: c.update(matrices={}), "no matrices"),
        (lambda c: c.update(files=[]), "damaged manifest"),
        (lambda c: c["matrices"][NAME]["input"].update(tensor="absent"), "damaged manifest .*absent"),
        (lambda c: c["matrices"][NAME]["input"].update(directions=3), "does not hold 3 directions"),
        (lambda c: c["matrices"][NAME].update(steps=[[1, 32], [48, 1]]), "are not those of"),
    ],
)
def test_damaged_manifests_are_named(path: Path, change: Callable[[dict], None], message: str) -> None:
    edit(path, change)
    with pytest.raises(ArchiveError, match=message):
        Archive(path)


def test_damaged_files_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"no archive.json"):
        Archive(tmp_path)
    content = shard(path).read_bytes()
    shard(path).write_bytes(content[:-1])
    with pytest.raises(ArchiveError, match=r"bytes, expected"):
        Archive(path)
    shard(path).unlink()
    with pytest.raises(ArchiveError, match="is missing"):
        Archive(path)
    (path / "archive.json").write_text("{")
    with pytest.raises(ArchiveError, match="truncated or corrupt"):
        Archive(path)


def test_changed_bytes_are_named(path: Path) -> None:
    rewrite(path, lambda basis: -basis, with_digest=False)
    with pytest.raises(ArchiveError, match=f"{NAME}.input has changed"):
        Archive(path).read(NAME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda basis: basis * 1.01, "is not orthonormal"),
        (lambda basis: basis.index_fill(1, torch.tensor([1]), 0.0), "is not orthonormal"),
        (lambda basis: basis.index_fill(1, torch.tensor([0]), float("nan")), "NaN"),
    ],
)
def test_bases_are_checked_even_with_a_right_digest(
    path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    rewrite(path, change, with_digest=True)
    with pytest.raises(ArchiveError, match=message):
        Archive(path).read(NAME)


def test_archive_is_bound_to_its_base(path: Path, model: Path, tmp_path: Path) -> None:
    archive = Archive(path)
    archive.check_base(open_checkpoint(model))
    with pytest.raises(ArchiveError, match=r"14 of 14 matrices differ .* run `sculptor analyze`"):
        archive.check_base(open_checkpoint(save_checkpoint(tmp_path / "other", seed=1)))
    with pytest.raises(ArchiveError, match=r"covers 14 matrices, 14 of them are not in"):
        archive.check_base(open_checkpoint(save_checkpoint(tmp_path / "gpt2", "gpt2")))
    resharded = save_checkpoint(tmp_path / "sharded", max_shard_size="20KB")
    archive.check_base(open_checkpoint(resharded))


def test_a_writer_goes_on_behind_the_last_complete_shard(path: Path, tmp_path: Path) -> None:
    archive = Archive(path)
    parts = [(archive.read(name), archive.spectrum(name)) for name in archive]

    def fill(directory: Path, count: int, key: str) -> ArchiveWriter:
        directory.mkdir(exist_ok=True)
        writer = ArchiveWriter(directory, torch.float32, {"key": key}, max_shard_bytes=4000)
        writer.resume()
        for found, spectrum in parts[:count]:
            if found.record.name not in writer.records:
                writer.add(found.record, found.output, found.input, spectrum)
        return writer

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fill(whole, 14, "a").finish(archive.manifest)
    killed = fill(cut, 7, "a")
    killed.close()
    assert 0 < len(killed.records) < 14
    (cut / "subspaces-00099.safetensors.tmp").write_bytes(b"half a shard")
    again = fill(cut, 14, "a")
    again.finish(archive.manifest)
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in cut.iterdir()}
    fill(tmp_path / "half", 7, "a").close()
    with pytest.raises(OutputError, match=r"other inputs or settings .key.* --overwrite"):
        fill(tmp_path / "half", 14, "b")


def test_a_full_disk_is_one_line(tmp_path: Path, small_disk: None) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_tensors({"a": torch.zeros(1 << 20)}, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
