"""A streamed step's gradients and updates, against dense float64 matrices of what the archive freezes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from torch import Tensor

import sculptor
from sculptor import AnalyzeSettings, Archive, TrainSettings
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.tasks.stream import StreamedModel
from sculptor.training.stepping.block import Stage

COVERS = [
    "sculptor.training.stepping.block",
    "sculptor.training.stepping.prepare",
]
RATE = 1e-3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed")
    save_checkpoint(path / "model")
    sculptor.analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, samples=False, device="cpu"))
    return path


@pytest.fixture
def streamed(made: Path) -> Iterator[StreamedModel]:
    settings = TrainSettings(offload="cpu", device="cpu", learning_rate=RATE, clip=0, weight_decay=0)
    with sculptor.stream(made / "model", made / "archive", settings) as model:
        yield model


def batch() -> Tensor:
    return torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def gradients64(made: Path) -> dict[str, Tensor]:
    """Full-size gradients of a model that is all there, in float64."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float64)
    model(batch(), labels=batch()).loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}


def projectors64(archive: Archive, name: str) -> tuple[Tensor, Tensor]:
    """I - U U^T and I - V V^T of what is frozen, for either form that a side is stored in."""
    entry, found = archive.read(name), []
    for side, dim in zip(("output", "input"), entry.record.rule.shape, strict=True):
        basis = entry.tensors[side].double()
        stored = basis @ torch.linalg.pinv(basis)
        free = getattr(entry.record.rule, side).form == "free"
        found.append(stored if free else torch.eye(dim, dtype=torch.float64) - stored)
    return found[0], found[1]


def free64(archive: Archive, name: str, matrix: Tensor) -> Tensor:
    left, right = projectors64(archive, name)
    return left @ matrix.double() @ right


def test_the_norm_is_that_of_the_free_part_of_every_gradient(made: Path, streamed: StreamedModel) -> None:
    streamed.backward(streamed.model(batch(), labels=batch()).loss)
    expected = gradients64(made)
    squares = [float(free64(streamed.archive, name, expected[name]).norm()) ** 2 for name in streamed.archive]
    assert streamed.updates.clip() == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_micro_batches_add_up(made: Path, streamed: StreamedModel) -> None:
    for row in batch():
        streamed.backward(streamed.model(row[None], labels=row[None]).loss / 3)
    parts = streamed.updates.clip()
    streamed.zero_grad()
    streamed.backward(streamed.model(batch(), labels=batch()).loss)
    assert streamed.updates.clip() == pytest.approx(parts, rel=1e-5)


def test_a_block_is_updated_when_it_is_next_fetched(made: Path, streamed: StreamedModel) -> None:
    """One stage follows the other; the first step of AdamW moves every coordinate by its rate, inside of what is free."""
    blocks, stream = streamed.updates.blocks, streamed.updates.stream
    assert {block.stage for block in blocks.values()} == {Stage.CURRENT}
    streamed.backward(streamed.model(batch(), labels=batch()).loss)
    assert {block.stage for block in blocks.values()} == {Stage.COLLECTED}
    streamed.step()
    assert {block.stage for block in blocks.values()} == {Stage.DUE}
    assert all(len(block.due.touched) == len(block.matrices) for block in blocks.values())
    streamed.updates.flush()
    assert {block.stage for block in blocks.values()} == {Stage.CURRENT}

    checkpoint = open_checkpoint(made / "model")
    for i, block in blocks.items():
        memory = torch.empty(stream.waiting.layouts[i].num_bytes, dtype=torch.uint8)
        stream.weights.load(i, memory)
        for matrix in block.matrices:
            moved = stream.waiting.layouts[i].view(memory, matrix.parameter_name) - checkpoint[matrix.record.tensor]
            count = sum(math.prod(shape) for shape in matrix.record.rule.shapes)
            assert float(moved.norm()) == pytest.approx(RATE * math.sqrt(count), rel=1e-2)
            allowed = free64(streamed.archive, matrix.name, moved)
            assert float((allowed - moved.double()).norm()) <= 1e-5 * float(moved.norm()) + 1e-6


@pytest.mark.slow
def test_what_no_update_makes_is_loaded(tmp_path: Path) -> None:
    """Of experts that are stacked, a parameter is made whole only if all of them are trained."""
    save_checkpoint(tmp_path / "model", "mixtral")
    for name, exclude in (("all", ()), ("some", ("*experts*0*",))):
        chosen = AnalyzeSettings(preserve=0.5, samples=False, device="cpu", exclude=exclude)
        sculptor.analyze(tmp_path / "model", tmp_path / name, chosen)
        with sculptor.stream(tmp_path / "model", tmp_path / name, TrainSettings(offload="cpu", device="cpu")) as model:
            stream = model.updates.stream
            for i, block in model.updates.blocks.items():
                numbers = dict.fromkeys(stream.waiting.layouts[i], 0)
                for matrix in block.matrices:
                    numbers[matrix.parameter_name] += math.prod(matrix.record.shape)
                made = {p for p, count in numbers.items() if count == math.prod(stream.waiting.layouts[i][p].shape)}
                assert set(block.others) == set(stream.waiting.layouts[i]) - made
                assert block.shares == any(numbers[p] > 0 for p in block.others)
                last = [matrix.parameter_name for matrix in block.matrices if matrix.is_last]
                assert len(last) == len(set(last)) == len({matrix.parameter_name for matrix in block.matrices})
            assert any(block.shares for block in model.updates.blocks.values()) == (name == "some")
