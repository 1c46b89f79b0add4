"""An analysis that is killed is taken up again by block, and ends as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.archive.shards import ShardWriter
from sculptor.archive.writer import ArchiveWriter
from sculptor.checkpoint.staging import NotPlacedError
from sculptor.errors import CheckpointError, OutputError


class KilledError(BaseException):
    """In the place of a signal."""


@pytest.mark.parametrize("basis", ["weights", "inputs", "curvature"])
def test_blocks_that_are_done_are_not_made_again(tmp_path: Path, basis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    settings = AnalyzeSettings(basis=basis, data=() if basis == "weights" else (str(rows),), device="cpu")
    analyze(model, tmp_path / "whole", settings)
    add, seen = ShardWriter.add, []

    def counted(self: ShardWriter, record: Any, derived: Any) -> None:
        seen.append(record.name)
        if len(seen) == 10:  # in the second of two blocks
            raise KilledError
        add(self, record, derived)

    monkeypatch.setattr(ShardWriter, "add", counted)
    with pytest.raises(KilledError):
        analyze(model, tmp_path / "cut", settings)
    first = [name for name in seen if ".0." in name]
    assert len(first) == 7
    seen.extend(["-"] * 10)
    analyze(model, tmp_path / "cut", settings, resume=True)
    assert not set(first) & set(seen[20:])
    whole, cut = Archive(tmp_path / "whole"), Archive(tmp_path / "cut")
    assert {name: each.sha256 for name, each in whole.manifest.tensors.items()} == {
        name: each.sha256 for name, each in cut.manifest.tensors.items()
    }
    assert [record.rule for record in whole.values()] == [record.rule for record in cut.values()]
    assert sorted(item.name for item in (tmp_path / "cut").iterdir()) == sorted(
        item.name for item in (tmp_path / "whole").iterdir()
    )


def test_an_archive_that_could_not_be_placed_is_kept_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_checkpoint(tmp_path / "model")
    settings = AnalyzeSettings(preserve=0.5, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
        with pytest.raises(NotPlacedError, match="Device or resource busy"):
            analyze(model, tmp_path / "a", settings)
    assert Archive(tmp_path / "a.partial").open_names
    analyze(model, tmp_path / "a", settings, resume=True)
    assert Archive(tmp_path / "a").open_names


def test_another_embedding_is_another_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_checkpoint(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    settings = AnalyzeSettings(basis="inputs", data=(str(rows),), device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(ArchiveWriter, "finish", lambda *_, **__: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            analyze(model, tmp_path / "a", settings)
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 0.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match=r"model.embed_tokens.weight changed since"):
        analyze(model, tmp_path / "a", settings, resume=True)


def test_the_input_is_never_where_the_output_is_staged(cli: Callable[..., Result], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "z.partial")
    before = sorted(item.name for item in model.iterdir())
    found = cli("analyze", model, "--output", tmp_path / "z", "--overwrite")
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert sorted(item.name for item in model.iterdir()) == before


@pytest.mark.parametrize(("cause", "kept"), [(OSError(5, "Input/output error"), True), (None, False)])
def test_a_read_that_fails_once_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: OSError | None, kept: bool
) -> None:
    model = save_checkpoint(tmp_path / "model")
    settings = AnalyzeSettings(preserve=0.5, device="cpu")
    add, seen = ShardWriter.add, []

    def failing(self: ShardWriter, record: Any, derived: Any) -> None:
        seen.append(record.name)
        if len(seen) == 10:
            raise CheckpointError("cannot read tensor x") from cause
        add(self, record, derived)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", failing)
        with pytest.raises(CheckpointError, match="cannot read"):
            analyze(model, tmp_path / "out", settings)
    assert (tmp_path / "out.partial").exists() == kept
