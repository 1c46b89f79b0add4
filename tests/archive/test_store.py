"""Archives: round trip, laziness, and every check on opening and reading."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file

from sculptor import AnalyzeSettings, analyze
from sculptor.archive.manifest import Manifest
from sculptor.archive.shards import save_tensors
from sculptor.archive.store import Archive, Entry
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.staging import writing
from sculptor.checkpoint.tensors import digest
from sculptor.checkpoint.written import begin
from sculptor.errors import ArchiveError, OutputError
from sculptor.methods.method import Derived
from sculptor.methods.staircase import StaircaseRule
from sculptor.numerics.bases import Basis, protected_directions
from sculptor.validation import sign

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
        found, rule = archive.read(name), rule_of(archive, name)
        for key, side, reference in (("output", rule.output, u[:, :k]), ("input", rule.input, vh[:k].T)):
            assert side is not None
            assert side.directions == k
            basis = Basis(found.tensors[key], side.form)
            assert basis.vectors.dtype == torch.float32
            assert 2 * basis.vectors.shape[1] <= basis.dim  # the smaller of the two forms
            span = protected_directions(basis).double()
            assert torch.linalg.matrix_norm(span @ span.T - reference @ reference.T, 2) < 1e-6
        assert rule.energy == pytest.approx(float(s[:k].square().sum() / s.square().sum()), rel=1e-9)
        torch.testing.assert_close(found.tensors["spectrum"], s.float(), atol=1e-5, rtol=1e-5)
        assert record.base_rms == pytest.approx(float(checkpoint[name].double().square().mean().sqrt()))


def rule_of(archive: Archive, name: str) -> StaircaseRule:
    rule = archive[name].rule
    assert isinstance(rule, StaircaseRule)
    return rule


def test_others_may_read_every_file_of_an_archive(path: Path) -> None:
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_manifest_survives_json(path: Path) -> None:
    manifest = Archive(path).manifest
    assert Manifest.from_json(json.dumps(manifest.to_json()).encode(), path) == manifest


def edit(path: Path, change: Callable[[dict], None], *, signed: bool = True) -> None:
    content = json.loads((path / "archive.json").read_text())
    before = content.pop("sha256")
    change(content)
    content["sha256"] = sign(content) if signed else before
    (path / "archive.json").write_text(json.dumps(content))


def test_a_changed_manifest_is_noticed(path: Path) -> None:
    edit(path, lambda c: c["matrices"][NAME]["rule"].update(energy=0.123), signed=False)
    with pytest.raises(ArchiveError, match="has changed since it was written"):
        Archive(path)


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
        (lambda c: c.update(version=99), "archive version 99, this sculptor reads versions 2 and 3"),
        (lambda c: c.pop("matrices"), "matrices: is missing"),
        (lambda c: c["matrices"][NAME]["rule"].update(steps=[[3, 1]]), "damaged .*steps"),
        (lambda c: c["matrices"][NAME].update(surprise=1), "surprise: is unknown"),
        (lambda c: c["matrices"][NAME]["rule"].update(surprise=1), "rule: 'surprise' is unknown"),
        (lambda c: c["matrices"][NAME]["rule"].update(kind="os.system"), "rule of kind 'os.system': expected one of"),
        (lambda c: c["settings"].update(constraint="triple"), "constraint: expected 'double', 'input' or 'core'"),
        (lambda c: c.update(matrices={}), "no matrices"),
        (lambda c: c.update(files=[]), r"\(files.*: Input should be an object"),
        (lambda c: c["files"].update({"../x": 3}), r"files.*'\.\./x'.*expected another form"),
        (lambda c: c["matrices"][NAME]["tensors"].update(input="absent"), "absent is not stored"),
        (lambda c: c["matrices"][NAME]["tensors"].pop("input"), "tensors input do not go with its rule"),
        (lambda c: c["matrices"][NAME]["rule"]["input"].update(directions=3), "more than are stored"),
        (lambda c: c["matrices"][NAME]["rule"].update(steps=[[1, 32], [48, 1]]), "are stored, the steps are those of"),
        (lambda c: c["matrices"].update(other=c["matrices"].pop(NAME)), "its record is of"),
        (
            lambda c: c["sections"].update(new={"file": "x", "num_bytes": 0, "sha256": "0" * 64}),
            "section 'new' is unknown",
        ),
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
    with pytest.raises(ArchiveError, match="damaged"):
        Archive(path)


def test_changed_bytes_are_named(path: Path) -> None:
    rewrite(path, lambda basis: -basis, with_digest=False)
    with pytest.raises(ArchiveError, match=f"{NAME}.input has changed"):
        _ = Archive(path).read(NAME).tensors["input"]


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
        _ = Archive(path).read(NAME).tensors["input"]


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
    parts: list[Entry] = [archive.read(name) for name in archive]

    def fill(directory: Path, count: int, key: str) -> ArchiveWriter:
        directory.mkdir(exist_ok=True)
        writer = ArchiveWriter(directory, torch.float32, {"key": key}, max_shard_bytes=4000)
        writer.resume()
        for found in parts[:count]:
            if found.record.name not in writer.records:
                writer.add(found.record, Derived(found.rule, found.tensors))
        return writer

    whole, cut = tmp_path / "whole", tmp_path / "cut.partial" / "output"
    cut.mkdir(parents=True)
    begin(cut.parent, "analyze")
    fill(whole, 14, "a").finish(archive.manifest)
    killed = fill(cut, 7, "a")
    killed.close()
    assert 0 < len(killed.records) < 14
    with writing(cut / "subspaces-00099.safetensors"):
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


@pytest.mark.parametrize("as_basis", [False, True])
def test_what_changes_after_it_was_checked_is_noticed(path: Path, as_basis: bool) -> None:
    """A training reads a tensor several times, and hashes it again only if its file was written to."""
    archive = Archive(path)
    name, stored = next(iter(archive.manifest.tensors.items()))
    read = archive.basis if as_basis else archive.tensor
    before = read(name)
    assert torch.equal(read(name), before)
    file = path / stored.file
    content = bytearray(file.read_bytes())
    content[archive._infos[name].offset] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArchiveError, match="has changed since it was written"):
        read(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bases_are_the_same_bits_and_checked(dtype: str, tmp_path: Path) -> None:
    base, path = save_checkpoint(tmp_path / "base"), tmp_path / "subspaces"
    analyze(base, path, AnalyzeSettings(preserve=0.5, device="cpu", dtype=dtype))
    archive = Archive(path)
    alone = {(name, key): archive.read(name).tensors[key] for name in archive for key in ("output", "input")}
    with archive.ahead(archive):
        together = {(name, key): archive.read(name).tensors[key] for name in archive for key in ("output", "input")}
    assert all(torch.equal(alone[key], together[key]) for key in alone)
    assert archive.take == archive.basis
    shard = next(path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    damaged = Archive(path)
    with damaged.ahead(damaged), pytest.raises(ArchiveError, match="has changed since it was written"):
        [damaged.read(name).tensors[key] for name in damaged for key in damaged[name].tensors]
