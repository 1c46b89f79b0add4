"""Mixing up an output's two archives is told with the one that fits."""

import json
from pathlib import Path

import pytest
from conftest import save_checkpoint, task_rows, write_rows
from transformers import AutoModelForCausalLM

from sculptor import AnalyzeSettings, Archive, TrainSettings, analyze, protect, train
from sculptor.errors import ArchiveError


def test_the_archive_that_fits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows())
    settings = TrainSettings(max_steps=2, batch_size=4, learning_rate=1e-2, device="cpu")
    out = tmp_path / "out"
    train(model, None, [rows], out, settings, protect_data=[rows])
    with pytest.raises(ArchiveError) as none:
        Archive(out)
    assert f"that of the model that was trained is {out / 'analyzed'}, the one for the task after this is" in str(
        none.value
    )
    base, tuned = (AutoModelForCausalLM.from_pretrained(path) for path in (model, out))
    with pytest.raises(ArchiveError, match=f"belongs to {out}, for the task after; use {out / 'analyzed'}"):
        protect(base, out / "subspaces")
    with pytest.raises(ArchiveError, match=f"use {out / 'subspaces'}"):
        protect(tuned, out / "analyzed")
    other = save_checkpoint(tmp_path / "other", seed=3)
    with pytest.raises(ArchiveError, match=f"it is the archive of what {out} was trained from"):
        train(other, out / "analyzed", [rows], tmp_path / "never", settings)
    analyze(model, tmp_path / "alone", AnalyzeSettings(preserve=0.5, device="cpu"))
    with pytest.raises(ArchiveError, match="run `sculptor analyze` on this checkpoint"):
        protect(AutoModelForCausalLM.from_pretrained(other), tmp_path / "alone")
    assert json.loads((out / "analyzed" / "archive.json").read_text())
