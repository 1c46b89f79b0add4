"""Outputs are complete or not there."""

from pathlib import Path

import pytest

from sculptor.checkpoint.staging import commit, partial_path, start_staging
from sculptor.errors import OutputError


def test_existing_output_and_left_overs_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = start_staging(output, overwrite=False, resume=False)
    assert partial == partial_path(output)
    (partial / "work").write_text("half")
    with pytest.raises(OutputError, match=r"left over .* --resume .* --overwrite"):
        start_staging(output, overwrite=False, resume=False)
    assert (start_staging(output, overwrite=False, resume=True) / "work").exists()
    assert not (start_staging(output, overwrite=True, resume=False) / "work").exists()
    commit(partial, output)
    assert not partial.exists()
    with pytest.raises(OutputError, match="exists already"):
        start_staging(output, overwrite=False, resume=True)


def test_overwrite_replaces_only_at_success(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("")
    partial = start_staging(output, overwrite=True, resume=False)
    assert (output / "old").exists()
    (partial / "new").write_text("")
    commit(partial, output)
    assert [file.name for file in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unwritable_place_is_one_line() -> None:
    with pytest.raises(OutputError, match=r"/proc/.*cannot write"):
        start_staging(Path("/proc/nowhere/out"), overwrite=False, resume=False)
