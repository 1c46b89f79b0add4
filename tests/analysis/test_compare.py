"""Archives compared by principal angles."""

from pathlib import Path

import pytest
from conftest import save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, Archive, analyze
from sculptor.analysis.compare import compare_archives
from sculptor.errors import ArchiveError


def test_same_nested_and_different_archives(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "m")
    archives = {}
    for preserve in (0.0, 0.25, 0.75):
        analyze(path, tmp_path / f"a{preserve}", AnalyzeSettings(preserve=preserve, device="cpu"))
        archives[preserve] = Archive(tmp_path / f"a{preserve}")
    for matrix in compare_archives(archives[0.75], archives[0.25]):  # nested: the smaller lies in the larger
        assert matrix.output.overlap == pytest.approx(1.0, abs=1e-9)
        assert matrix.input.largest_angle == pytest.approx(0.0, abs=1e-3)
        assert (matrix.output.first, matrix.output.second) == (3 * matrix.output.second, matrix.output.second)
    empty = compare_archives(archives[0.75], archives[0.0])[0]
    assert (empty.output.overlap, empty.output.second) == (None, 0)
    other = save_checkpoint(tmp_path / "other", seed=5)
    analyze(other, tmp_path / "b", AnalyzeSettings(preserve=0.25, device="cpu"))
    overlap = compare_archives(archives[0.25], Archive(tmp_path / "b"))[0].output.overlap
    assert overlap is not None
    assert overlap < 0.6
    gpt2 = save_checkpoint(tmp_path / "gpt2", "gpt2")
    analyze(gpt2, tmp_path / "c", AnalyzeSettings(preserve=0.25, device="cpu"))
    with pytest.raises(ArchiveError, match="share no matrix"):
        compare_archives(archives[0.25], Archive(tmp_path / "c"))


def test_only_directions_that_are_told_apart_are_compared(tmp_path: Path) -> None:
    """Two budgets over the same moments store the same directions and protect different ones."""
    path, rows = save_checkpoint(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl", task_rows())
    found = {}
    for budget in (0.6, 0.95):
        settings = AnalyzeSettings(basis="curvature", data=(str(rows),), budget=budget, device="cpu")
        analyze(path, tmp_path / f"a{budget}", settings)
        found[budget] = Archive(tmp_path / f"a{budget}")
    compared = compare_archives(found[0.6], found[0.95])
    assert any(matrix.input.first > matrix.input.second for matrix in compared)
    assert all(matrix.input.overlap is None or matrix.input.overlap > 0.99 for matrix in compared)  # nested
