"""What processes exchange by formula, against the calls that they make, and by hand."""

from pathlib import Path
from typing import Any

import pytest
from conftest import save_checkpoint, task_rows, write_rows
from together import moved_bytes, together

import sculptor
from sculptor import AnalyzeSettings, EstimateSettings, TrainSettings
from sculptor.planning.traffic import added_up, shown

CPU = {"device": "cpu"}


def test_blocks_that_are_still_there_are_not_shown() -> None:
    blocks = [10.0, 20.0, 30.0, 40.0]
    # Forward all, backward all but the last; what is beside them once.
    assert shown(blocks, 8, 1, 2, 1) == (100 + 60 + 8) / 2
    assert shown(blocks, 8, 1, 4, 2) == 0.75 * (100 + 30 + 8)
    # The second forward pass begins where the first backward pass ended.
    assert shown(blocks, 8, 2, 2, 1) == (2 * 168 - 10) / 2
    assert shown(blocks, 8, 2, 2, 2) == (2 * 138 - 30) / 2
    assert added_up(100, 4) == 2 * 0.75 * 400


@pytest.mark.parametrize(
    ("micro", "preserve", "logits"), [(4, 0.5, None), (4, 0.1, None), (2, 0.5, None), (4, 0.5, 200)]
)
def test_the_formula_is_what_processes_do(tmp_path: Path, micro: int, preserve: float, logits: int | None) -> None:
    """Half of the directions free are read before gradients are added up, most of them are not; with logits made in slices."""
    model, archive = save_checkpoint(tmp_path / "model"), tmp_path / "archive"
    rows = write_rows(tmp_path / "rows.jsonl", task_rows())
    sculptor.analyze(model, archive, AnalyzeSettings(preserve=preserve, samples=False, **CPU))
    chosen: dict[str, Any] = {"batch_size": 8, "micro_batch_size": micro, **CPU}
    settings = TrainSettings(max_steps=3, parallel="shard", carry="keep", learning_rate=1e-3, **chosen)
    counted = together(2, moved_bytes, logits, model, archive, [rows], tmp_path / "out", settings)
    planned = sculptor.estimate(model, EstimateSettings(gpus=2, **chosen), subspaces=archive, data=[rows])
    plan = planned.modes["shard"].plan
    assert counted == [pytest.approx(plan.exchanged, rel=0.02)] * 2
