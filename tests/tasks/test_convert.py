"""`convert` by its command: exit codes, and what it does not touch."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, save_checkpoint

from sculptor import AnalyzeSettings, Archive, analyze, convert

COVERS = ["sculptor.archive.version2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its archive."""
    path = tmp_path_factory.mktemp("convert")
    save_checkpoint(path / "model")
    save_checkpoint(path / "other", seed=1)
    analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return path


def test_what_was_converted_is_said(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    found = cli("convert", made / "archive", "--model", made / "model", "-o", tmp_path / "new")
    assert (found.code, found.err) == (0, "")
    assert found.out == f"14 matrices.\nWrote {tmp_path / 'new'}.\n"
    one, two = ({f.name: f.read_bytes() for f in path.iterdir()} for path in (made / "archive", tmp_path / "new"))
    assert one == two, "one of today's format stays as it is"


def test_an_existing_output_is_replaced_only_if_asked(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    arguments = ("convert", made / "archive", "--model", made / "model", "-o", tmp_path / "new")
    assert cli(*arguments).code == 0
    again = cli(*arguments)
    assert again.code == 1
    assert again.err == (f"error: {tmp_path / 'new'}: exists already; choose another --output or pass --overwrite\n")
    assert cli(*arguments, "--overwrite").code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "poem.txt").write_text("roses")
    spared = cli("convert", made / "archive", "--model", made / "model", "-o", tmp_path / "mine", "--overwrite")
    assert spared.code == 1
    assert (tmp_path / "mine" / "poem.txt").read_text() == "roses"


@pytest.mark.parametrize("name", ["archive", "model"])
def test_an_input_is_no_output(cli: Callable[..., Result], made: Path, name: str) -> None:
    found = cli("convert", made / "archive", "--model", made / "model", "-o", made / name, "--overwrite")
    assert found.code == 1
    assert "is or holds the input" in found.err
    assert len(Archive(made / "archive")) == 14


@pytest.mark.parametrize(
    ("archive", "model", "code", "needle"),
    [
        ("none", "model", 1, "no archive.json; expected a subspace archive"),
        ("archive", "none", 1, "none"),
        ("archive", "other", 1, "archive of another checkpoint: 14 of 14 matrices differ"),
    ],
)
def test_wrong_inputs_are_one_line(
    cli: Callable[..., Result], made: Path, archive: str, model: str, code: int, needle: str, tmp_path: Path
) -> None:
    found = cli("convert", made / archive, "--model", made / model, "-o", tmp_path / "new")
    assert (found.code, found.out) == (code, "")
    assert len(found.err.splitlines()) == 1
    assert needle in found.err
    assert not list(tmp_path.iterdir())


def test_a_missing_option_is_named(cli: Callable[..., Result], made: Path, tmp_path: Path) -> None:
    found = cli("convert", made / "archive", "-o", tmp_path / "new")
    assert found.code == 2
    assert "--model" in found.err


def test_nothing_is_left_of_a_conversion_that_failed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sculptor.tasks.convert.shutil.copyfile", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(made / "archive", tmp_path / "new", model=made / "model")
    assert not list(tmp_path.iterdir())
