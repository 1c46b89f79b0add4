"""A checkpoint made ready for training: what is opened, where it is, and what is given back when that fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, slowly, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, evaluate, train, verify
from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.staging import writing
from sculptor.checkpoint.written import begin
from sculptor.errors import SettingsError
from sculptor.model.load import LoadedModel
from sculptor.numerics import reflectors
from sculptor.progress import silent
from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.regions import DeviceRegion, HostRegion
from sculptor.training import coordinates
from sculptor.training import setup as module
from sculptor.training.protect import protected_matrices
from sculptor.training.setup import prepare_model, trained_dtypes
from sculptor.training.stepping.resident import ResidentUpdates
from sculptor.training.stepping.streamed import StreamedUpdates
from sculptor.training.stepping.updates import Updates

CPU = torch.device("cpu")
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "soften": 0.0, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model and one with tied embeddings, with archives of some of their matrices."""
    path = tmp_path_factory.mktemp("setup")
    for family in ("llama", "llama-tied"):
        save_checkpoint(path / family, family, dtype=torch.bfloat16)
        chosen = AnalyzeSettings(preserve=0.5, exclude=("o_proj",), device="cpu")
        analyze(path / family, path / f"{family} archive", chosen)
    return path


def prepare(
    made: Path, scratch: Path, *extra: str, family: str = "llama", **changes: Any
) -> tuple[LoadedModel, Updates]:
    checkpoint = open_checkpoint(made / family)
    architecture, archive = inspect_architecture(checkpoint), Archive(made / f"{family} archive")
    settings = TrainSettings(**({"offload": "none"} | SETTINGS | changes))
    return prepare_model(checkpoint, architecture, archive, settings, extra, CPU, scratch, silent)


@pytest.mark.parametrize(
    ("offload", "kind"), [("none", ResidentUpdates), ("cpu", StreamedUpdates), ("disk", StreamedUpdates)]
)
def test_the_setting_decides_where_blocks_are(made: Path, offload: str, kind: type[Updates], tmp_path: Path) -> None:
    loaded, updates = prepare(made, tmp_path / "scratch", offload=offload)
    assert type(updates) is kind
    assert (loaded.stream is None) == (offload == "none")
    assert updates.num_trainable == Archive(made / "llama archive").num_free
    assert (tmp_path / "scratch").exists() == (offload == "disk")
    updates.close()
    loaded.close()


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_what_waited_on_disk_before_goes(made: Path, offload: str, tmp_path: Path) -> None:
    scratch = tmp_path / "output.partial" / "scratch"
    scratch.mkdir(parents=True)
    begin(scratch.parent, "train")
    with writing(scratch / "left over"):
        (scratch / "left over").write_bytes(b"of a killed run")
    (scratch / "notes").write_bytes(b"somebody's")
    loaded, updates = prepare(made, scratch, offload=offload)
    assert not (scratch / "left over").exists()
    assert (scratch / "notes").exists()
    updates.close()
    loaded.close()


@pytest.mark.parametrize("offload", ["none", "bases", "cpu", "disk"])
def test_only_what_was_asked_for_is_open_and_in_float32(made: Path, offload: str, tmp_path: Path) -> None:
    loaded, updates = prepare(made, tmp_path / "scratch", NORM, HEAD, offload=offload)
    assert set(updates.extra) == {NORM, HEAD}
    checkpoint = open_checkpoint(made / "llama")
    for name, value in updates.extra.items():
        assert value.requires_grad
        assert value.dtype == torch.float32
        assert value is loaded.model.get_parameter(name)
        assert torch.equal(value, checkpoint[name].float())
    opened = {id(value) for value in updates.extra.values()}
    coordinates = {id(a) for matrix in protected_matrices(loaded.model) for a in matrix.coordinates.values}
    for name, value in loaded.model.named_parameters():
        if offload != "none" and not value.numel():  # a streamed block's, which is away
            continue
        assert value.requires_grad == (id(value) in opened | coordinates), name
    expected = Archive(made / "llama archive").num_free + sum(value.numel() for value in updates.extra.values())
    assert updates.num_trainable == expected
    updates.close()
    loaded.close()


@pytest.mark.parametrize(
    ("offload", "apart", "changing"), [("bases", HostRegion, DeviceRegion), ("cpu", HostRegion, HostRegion)]
)
def test_where_things_wait(made: Path, offload: str, apart: type, changing: type, tmp_path: Path) -> None:
    loaded, updates = prepare(made, tmp_path / "scratch", offload=offload)
    assert isinstance(updates, StreamedUpdates)
    for i, block in updates.blocks.items():
        assert [type(region) for region in (block.bases, block.pristine)] == [apart] * 2
        weights = updates.stream.weights.region(i)
        assert [type(region) for region in (block.state, block.gradients, weights)] == [changing] * 3
    updates.close()
    loaded.close()


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_tied_parameter_is_opened_once(made: Path, offload: str, tmp_path: Path) -> None:
    loaded, updates = prepare(made, tmp_path / "scratch", EMBEDDING, HEAD, family="llama-tied", offload=offload)
    assert list(updates.extra) == [EMBEDDING]
    assert loaded.model.get_parameter(HEAD) is updates.extra[EMBEDDING]
    updates.close()
    loaded.close()


def test_activations_are_kept_unless_asked_otherwise(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed: list[Any] = []
    plain = module.checkpoint_activations
    monkeypatch.setattr(module, "checkpoint_activations", lambda model: recomputed.append(model) or plain(model))
    for asked, expected in ((None, 0), (False, 0), (True, 1)):
        loaded, updates = prepare(made, tmp_path / "scratch", checkpoint_activations=asked)
        assert [model is loaded.model for model in recomputed] == [True] * expected
        updates.close()


def test_trained_weights_are_computed_in_what_is_asked(made: Path) -> None:
    checkpoint, archive = open_checkpoint(made / "llama"), Archive(made / "llama archive")
    architecture = inspect_architecture(checkpoint)
    open_parameters = {archive[name].parameter for name in archive.open_names}
    assert len(open_parameters) == 12, "two of 14 are not in the archive"
    for dtype in (torch.float32, torch.bfloat16):
        assert trained_dtypes(architecture, archive, dtype) == dict.fromkeys(open_parameters, dtype)


def test_a_frozen_matrix_is_not_computed_as_a_trained_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(made / "llama archive")
    architecture = inspect_architecture(open_checkpoint(made / "llama"))
    closed = list(archive)[3]
    monkeypatch.setattr(Archive, "open_names", property(lambda self: [name for name in self if name != closed]))
    found = trained_dtypes(architecture, archive, torch.float32)
    assert archive[closed].parameter not in found
    assert len(found) == 11


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            MemoryError("the host gives no 3.0 GB"),
            SettingsError,
            r"--offload cpu: the host gives no 3.0 GB; use --offload disk",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (ValueError("something else"), ValueError, "something else"),
    ],
)
def test_memory_is_given_back_when_it_fails(
    made: Path,
    raised: BaseException,
    expected: type[BaseException],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[BlockStream] = []
    close = BlockStream.close

    def noted(self: BlockStream) -> None:
        closed.append(self)
        close(self)

    def fails(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(BlockStream, "close", noted)
    monkeypatch.setattr(module, "StreamedUpdates", fails)
    with pytest.raises(expected, match=message):
        prepare(made, tmp_path / "scratch", offload="cpu")
    assert len(closed) == 1


@pytest.mark.parametrize(
    "told", [{"preserve": 0.8}, *slowly({"preserve": 0.8, "constraint": "input"}, {"basis": "curvature"})]
)
@pytest.mark.parametrize("offload", ["none", *slowly("cpu")])
def test_boxes_that_begin_before_what_is_free_merge_to_what_was_trained(
    told: dict[str, Any], offload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflectors, "ALIGNED", 5)
    monkeypatch.setattr(reflectors, "WIDE", 2)
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    data = (str(rows),) if told.get("basis") else ()
    analyze(model, tmp_path / "archive", AnalyzeSettings(**told, data=data, device="cpu"))
    settings = TrainSettings(max_steps=3, batch_size=8, eval_every=1, learning_rate=1e-2, offload=offload, device="cpu")
    report = train(model, tmp_path / "archive", [rows], tmp_path / "out", settings, eval_data=[rows])
    assert report.loop.best_loss is not None
    assert report.loop.best_loss < report.loop.first_loss - 0.02
    assert evaluate(tmp_path / "out", rows, device="cpu").loss == pytest.approx(report.loop.best_loss, abs=1e-5)
    assert verify(model, tmp_path / "out", tmp_path / "archive", device="cpu").passed


@pytest.mark.parametrize(("precision", "native", "dtype"), [
    ("float32", True, torch.float32), ("bfloat16", True, torch.bfloat16), ("bfloat16", False, torch.float32),
])  # fmt: skip
def test_products_with_bases_are_formed_in_what_the_device_multiplies(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(coordinates, "multiplies_bfloat16", lambda device: native)
    loaded, updates = prepare(made, tmp_path / "scratch", precision=precision)
    matrices = protected_matrices(loaded.model)
    assert {tensor.dtype for matrix in matrices for tensor in matrix.coordinates.tensors.values()} == {dtype}
    assert {value.dtype for matrix in matrices for value in matrix.coordinates.trained} == {torch.float32}
    updates.close()
