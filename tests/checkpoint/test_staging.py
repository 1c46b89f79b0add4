"""Outputs are complete or not there."""

from pathlib import Path

import pytest

from sculptor.checkpoint.staging import check_apart, commit, partial_path, staging
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
    (output / "config.json").write_text("")
    (tmp_path / "out.old").mkdir()
    partial = start(output, overwrite=True)
    assert (output / "config.json").exists()
    (partial / "new").write_text("")
    commit(partial, output)
    assert [file.name for file in output.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"]


def test_overwrite_touches_only_outputs(tmp_path: Path) -> None:
    output = tmp_path / "home"
    output.mkdir()
    (output / "precious").write_text("")
    with pytest.raises(OutputError, match="neither a checkpoint nor an archive"):
        start(output, overwrite=True)
    assert (output / "precious").exists()


def test_inputs_are_never_outputs(tmp_path: Path) -> None:
    (tmp_path / "work" / "model").mkdir(parents=True)
    for output in (tmp_path / "work" / "model", tmp_path / "work", tmp_path / "work" / "model" / ".." / "model"):
        with pytest.raises(OutputError, match=r"is or holds the input .*model"):
            check_apart(output, [tmp_path / "work" / "model"])
    check_apart(tmp_path / "work" / "model" / "tuned", [tmp_path / "work" / "model", "owner/name"])


def test_two_runs_do_not_share_a_place(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staging(output, overwrite=False, resume=False, worth_keeping=lambda _: True) as partial:
        (partial / "work").write_text("")
        for resume in (True, False):
            with pytest.raises(OutputError, match="another run is writing there"):
                start(output, overwrite=not resume, resume=resume)
        assert (partial / "work").exists()
    assert start(output, resume=True) == partial


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
