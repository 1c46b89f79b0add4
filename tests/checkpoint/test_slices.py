"""A target may be a slice of a tensor, as an expert of several that are stored together: read, written and streamed alone."""

from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file, save_file

from sculptor import Archive
from sculptor.analysis.verify import verify_checkpoints
from sculptor.archive.manifest import Manifest, MatrixRecord, TaskRecord
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.architecture import Target
from sculptor.checkpoint.reader import Checkpoint, Slice, open_checkpoint
from sculptor.checkpoint.tensors import digest
from sculptor.checkpoint.writer import write_checkpoint
from sculptor.errors import CheckpointError
from sculptor.methods.method import Evidence
from sculptor.methods.settings import AnalyzeSettings
from sculptor.methods.weights import Weights
from sculptor.numerics.rounding import rms
from sculptor.streaming.files import TensorFiles
from sculptor.streaming.transfers import Staging

STACKED = "model.layers.0.mlp.experts.down_proj"
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path, generator: torch.Generator) -> Checkpoint:
    """A checkpoint in which four experts are stored as one tensor."""
    path = save_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors[STACKED] = torch.randn(4, 12, 8, generator=generator)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return open_checkpoint(path)


def target(part: int | None) -> Target:
    return Target(STACKED, STACKED, "model.layers.0", 0, "mlp.experts.down_proj", (12, 8), False, "g", part)


def test_a_slice_is_read_alone(checkpoint: Checkpoint) -> None:
    whole = checkpoint[STACKED]
    for part in range(4):
        found = target(part)
        assert found.name == f"{STACKED}[{part}]"
        assert checkpoint.info_of(found).shape == (12, 8)
        assert torch.equal(checkpoint.matrix(found), whole[part])
    assert torch.equal(checkpoint.matrix(Slice(STACKED)), whole)
    assert not checkpoint.has(target(4))
    with pytest.raises(CheckpointError, match=r"has no part 4"):
        checkpoint.matrix(target(4))
    with pytest.raises(CheckpointError, match=r"has no part 0"):
        checkpoint.matrix(Slice("model.norm.weight", 0))


def test_a_slice_is_streamed_alone(checkpoint: Checkpoint) -> None:
    files = TensorFiles(checkpoint, {}, Staging(CPU, 2**20))
    into = torch.empty(12, 8)
    files.read(target(2), into)
    assert torch.equal(into, checkpoint[STACKED][2])
    files.close()


def test_slices_are_written_one_by_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def double(old: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(old.shape))
        return 2 * old

    (tmp_path / "out").mkdir()
    write_checkpoint(checkpoint, tmp_path / "out", {STACKED: {1: double, 3: double}})
    before, after = checkpoint[STACKED], open_checkpoint(tmp_path / "out")[STACKED]
    factors = torch.tensor([1.0, 2.0, 1.0, 2.0])[:, None, None]
    assert torch.equal(after, factors * before)
    assert seen == [(12, 8), (12, 8)], "never the whole tensor"


def archive_of(checkpoint: Checkpoint, path: Path, parts: tuple[int, ...]) -> Archive:
    """An archive of some experts."""
    path.mkdir()
    method, writer = Weights(AnalyzeSettings(preserve=0.5)), ArchiveWriter(path, torch.float32, {})
    for part in parts:
        of = target(part)
        weight = checkpoint.matrix(of)
        derived = method.derive(Evidence(of.name, of.shape, weight.double().clone))
        record = MatrixRecord(
            of.tensor, part, of.parameter, of.block, 0, of.role, False, of.input_group, "float32", digest(weight),
            rms(weight), derived.rule,
        )  # fmt: skip
        writer.add(record, derived)
    settings = AnalyzeSettings(preserve=0.5)
    task = TaskRecord("analysis", "analysis")
    writer.finish(Manifest("sculptor", "LlamaForCausalLM", "", settings, (task,), {}, {}, {}))
    return Archive(path)


def test_an_archive_of_slices_is_bound_and_verified(checkpoint: Checkpoint, tmp_path: Path) -> None:
    archive = archive_of(checkpoint, tmp_path / "a", (0, 2))
    assert list(archive) == [f"{STACKED}[0]", f"{STACKED}[2]"]
    archive.check_base(checkpoint)
    entry = archive.read(f"{STACKED}[2]")
    leading = entry.tensors["input"][:, :1] if entry.rule.figures().preserved else None
    assert leading is not None

    def tuned(name: str, edits: dict[int, torch.Tensor]) -> Checkpoint:
        (tmp_path / name).mkdir()
        made = {part: (lambda old, added=added: old + added) for part, added in edits.items()}
        write_checkpoint(checkpoint, tmp_path / name, {STACKED: made})
        return open_checkpoint(tmp_path / name)

    assert verify_checkpoints(checkpoint, tuned("same", {}), archive).passed
    inside = verify_checkpoints(checkpoint, tuned("inside", {2: torch.ones(12, 8)}), archive)
    assert [m.name for m in inside.matrices if not m.holds] == [f"{STACKED}[2]"]
    outside = verify_checkpoints(checkpoint, tuned("outside", {1: torch.ones(12, 8)}), archive)
    assert outside.changed_elsewhere == (f"{STACKED}[1]",), "a slice that is not in the archive is compared as it is"
    assert all(matrix.holds for matrix in outside.matrices)
