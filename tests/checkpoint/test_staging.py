"""Outputs are complete or not there."""

from pathlib import Path

import pytest

from sculptor.checkpoint.staging import commit, partial_path, staging
from sculptor.errors import OutputError


def start(output: Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    with staging(output, overwrite=overwrite, resume=resume, worth_keeping=lambda _: True) as partial:
        return partial


def test_existing_output_and_left_overs_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = start(output)
    assert partial == partial_path(output)
    (partial / "work").write_text("half")
    with pytest.raises(OutputError, match=r"left over .* --resume .* --overwrite"):
        start(output)
    assert (start(output, resume=True) / "work").exists()
    assert not (start(output, overwrite=True) / "work").exists()
    commit(partial, output)
    assert not partial.exists()
    with pytest.raises(OutputError, match="exists already"):
        start(output, resume=True)


def test_overwrite_replaces_only_at_success(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("")
    partial = start(output, overwrite=True)
    assert (output / "old").exists()
    (partial / "new").write_text("")
    commit(partial, output)
    assert [file.name for file in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("worth", [True, False])
def test_after_an_error_only_progress_is_kept(tmp_path: Path, worth: bool) -> None:
    output = tmp_path / "out"
    with (
        pytest.raises(KeyboardInterrupt),
        staging(output, overwrite=False, resume=False, worth_keeping=lambda _: worth),
    ):
        raise KeyboardInterrupt
    assert partial_path(output).exists() == worth


def test_unwritable_place_is_one_line() -> None:
    with pytest.raises(OutputError, match=r"/proc/.*cannot write"):
        start(Path("/proc/nowhere/out"))
