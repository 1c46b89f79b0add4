"""Outputs are complete or not there."""

import errno
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from sculptor.checkpoint.durable import make_durable
from sculptor.checkpoint.staging import (
    NotPlacedError,
    check_apart,
    check_free,
    commit,
    one_pass,
    partial_path,
    staging,
    writing,
)
from sculptor.checkpoint.tensors import remedy_of
from sculptor.checkpoint.written import LOCK_NAME, MARKER_NAME, discard, fingerprint, note
from sculptor.errors import OutputError
from sculptor.interruption import Interrupted

COVERS = ["sculptor.checkpoint.written"]


def start(output: Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    with staging(
        output, command="analyze", overwrite=overwrite, resume=resume, worth_keeping=lambda _: True
    ) as partial:
        return partial


def put(path: Path, text: str = "") -> None:
    """Writes a file as the product does."""
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def ours(output: Path, *names: str) -> None:
    """Makes an output as a run leaves it."""
    for name in names:
        (output / name).write_text("")
    files = {file.name: fingerprint(file) for file in output.iterdir()}
    (output / MARKER_NAME).write_text(json.dumps({"files": files}))


def test_existing_output_and_left_overs_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = start(output)
    assert partial == partial_path(output)
    put(partial / "work", "half")
    with pytest.raises(OutputError, match=r"left over .* --resume .* --overwrite"):
        start(output)
    assert (start(output, resume=True) / "work").exists()
    assert not (start(output, overwrite=True) / "work").exists()
    commit(partial, output, overwrite=True)
    assert not partial.exists()
    with pytest.raises(OutputError, match="exists already"):
        start(output, resume=True)


def test_what_cannot_be_resumed_is_not_offered_to_be(tmp_path: Path) -> None:
    partial = start(tmp_path / "out")
    (partial / "output").mkdir()
    (partial / "output" / "model.safetensors").write_text("half")
    expected = "left over from a run that did not finish; pass --overwrite to start anew"
    with (
        pytest.raises(OutputError, match=expected),
        one_pass(tmp_path / "out", command="edit lines", overwrite=False),
    ):
        pass


def test_overwrite_replaces_only_at_success(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    ours(output, "sculptor.json")
    (tmp_path / "out.old").mkdir()
    partial = start(output, overwrite=True)
    assert (output / "sculptor.json").exists()
    put(partial / "new")
    commit(partial, output, overwrite=True)
    assert sorted(file.name for file in output.iterdir()) == [".sculptor", "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["precious"], "is no output of sculptor"),
        (["config.json", "main.py"], "is no output of sculptor"),
        (["archive.json", "photo.jpg"], "is no output of sculptor"),
        (["sculptor.json", ".git"], "is no output of sculptor"),
    ],
)
def test_overwrite_touches_only_outputs(tmp_path: Path, names: list[str], message: str) -> None:
    output = tmp_path / "home"
    output.mkdir()
    for name in names:
        (output / name).write_text("")
    with pytest.raises(OutputError, match=message):
        start(output, overwrite=True)
    assert sorted(item.name for item in output.iterdir()) == sorted(names)
    assert not partial_path(output).exists()


@pytest.mark.parametrize("name", ["notes.md", ".git/HEAD", "second/model.safetensors", "src/x.py"])
def test_overwrite_spares_what_came_to_lie_in_an_output(tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    ours(output, "sculptor.json", "config.json")
    start(output, overwrite=True)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    with pytest.raises(OutputError, match=f"holds {name}, which sculptor did not write"):
        start(output, overwrite=True)
    assert (output / name).read_text() == "mine"


def test_what_another_command_left_is_not_taken_up(tmp_path: Path) -> None:
    output = tmp_path / "out"
    put(start(output) / "work", "hours")
    with (
        pytest.raises(OutputError, match="left by `analyze`, not by `train`"),
        staging(output, command="train", overwrite=False, resume=True, worth_keeping=lambda _: True),
    ):
        pass
    assert (start(output, resume=True) / "work").read_text() == "hours"


def test_files_of_an_input_may_be_links_into_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").symlink_to(tmp_path / "out" / "weights")
    with pytest.raises(OutputError, match="is or holds the input"):
        check_apart(tmp_path / "out", [tmp_path / "model"])


@pytest.mark.parametrize("resume", [True, False])
def test_a_staging_directory_of_somebody_else_is_left_alone(tmp_path: Path, resume: bool) -> None:
    theirs = partial_path(tmp_path / "out")
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="in the way and not ours"):
        start(tmp_path / "out", overwrite=not resume, resume=resume)
    assert (theirs / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_exchange_loses_nothing(tmp_path: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "sculptor.json").write_text("old")
    ours(output)
    rename, count = Path.rename, [0]

    def failing(self: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] == fails_at:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with (  # noqa: PT012
        pytest.raises(NotPlacedError, match=r"No space left.*complete in .*out.partial"),
        staging(output, command="analyze", overwrite=True, resume=False, worth_keeping=lambda _: False) as partial,
    ):
        put(partial / "sculptor.json", "new")
        monkeypatch.setattr(Path, "rename", failing)
        commit(partial, output, overwrite=True)
    assert (output / "sculptor.json").read_text() == "old"
    assert (partial_path(output) / "sculptor.json").read_text() == "new"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "out.partial"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(NotPlacedError, match="exists already"),
        staging(output, command="analyze", overwrite=False, resume=False, worth_keeping=lambda _: False) as partial,
    ):
        (partial / "work").write_text("ours")
        output.mkdir()
        (output / "theirs").write_text("")
        commit(partial, output, overwrite=False)
    assert (output / "theirs").exists()
    assert (partial_path(output) / "work").exists()


def test_the_lock_is_held_until_the_place_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, seen = tmp_path / "out", []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        with pytest.raises(OutputError, match="another run is writing there"):
            start(output, resume=True)
        seen.append(rename(self, target))
        return seen[0]

    with staging(output, command="analyze", overwrite=False, resume=False, worth_keeping=lambda _: False) as partial:
        put(partial / "work")
        monkeypatch.setattr(Path, "rename", watched)
        commit(partial, output, overwrite=False)
        with pytest.raises(OutputError, match="exists already"):
            start(output)
    assert seen == [output]
    assert sorted(item.name for item in output.iterdir()) == [".sculptor", "work"]


def test_inputs_are_never_outputs(tmp_path: Path) -> None:
    (tmp_path / "work" / "model").mkdir(parents=True)
    for output in (tmp_path / "work" / "model", tmp_path / "work", tmp_path / "work" / "model" / ".." / "model"):
        with pytest.raises(OutputError, match=r"is or holds the input .*model"):
            check_apart(output, [tmp_path / "work" / "model"])
    for place in (tmp_path / "z.partial", tmp_path / "z.partial" / "model"):
        place.mkdir(parents=True, exist_ok=True)
        with pytest.raises(OutputError, match=r"is staged in .*z.partial, which is or holds the input"):
            check_apart(tmp_path / "z", [place])
    (tmp_path / "link").symlink_to(tmp_path / "work")
    for inside in (tmp_path / "work" / "model" / "tuned", tmp_path / "link" / "x" / ".." / "model" / "a" / "b"):
        with pytest.raises(OutputError, match=r"lies in the input .*model; choose a place beside it"):
            check_apart(inside, [tmp_path / "work" / "model"])
    check_apart(tmp_path / "work" / "model2", [tmp_path / "work" / "model", "owner/name"])


def test_two_runs_do_not_share_a_place(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staging(output, command="analyze", overwrite=False, resume=False, worth_keeping=lambda _: True) as partial:
        put(partial / "work")
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
        staging(output, command="analyze", overwrite=False, resume=False, worth_keeping=lambda _: worth),
    ):
        raise KeyboardInterrupt
    assert partial_path(output).exists() == worth


def test_unwritable_place_is_one_line() -> None:
    with pytest.raises(OutputError, match=r"/proc/.*cannot write"):
        start(Path("/proc/nowhere/out"))


def test_a_finished_output_cannot_look_unfinished(tmp_path: Path) -> None:
    """Its name would be the staging place of another output, which empties it."""
    with pytest.raises(OutputError, match=r"end in \.partial"):
        start(tmp_path / "out.partial")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_is_no_staging_directory(tmp_path: Path, resume: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MARKER_NAME).write_text("analyze")
    (elsewhere / "thesis.txt").write_text("mine")
    partial_path(tmp_path / "out").symlink_to(elsewhere)
    with pytest.raises(OutputError, match=f"is a link to {elsewhere}, .* move it or choose another --output"):
        start(tmp_path / "out", overwrite=not resume, resume=resume)
    assert (elsewhere / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "ours_too"),
    [
        ('{"key": 1, "shards": [], "records": {}, "tensors": {}}', True),
        ('{"key": "experiment 7"}', False),
        ("my evaluation", False),
        ("[1]", False),
    ],
)
def test_progress_of_somebody_else_are_kept(tmp_path: Path, content: str, ours_too: bool) -> None:
    output = tmp_path / "out"
    output.mkdir()
    ours(output, "sculptor.json")
    (output / "progress.json").write_text(content)
    if ours_too:  # a run that could not tidy up
        start(output, overwrite=True)
        return
    with pytest.raises(OutputError, match=r"holds progress\.json, which sculptor did not write"):
        start(output, overwrite=True)
    assert (output / "progress.json").read_text() == content


@pytest.mark.parametrize(
    "name", ["notes.txt", "thesis/a.tex", "work.bak", "output/notes.txt", "state/step-00000001/best.txt"]
)
@pytest.mark.parametrize("resume", [True, False])
def test_what_came_to_lie_in_a_staging_directory_is_refused_and_kept(tmp_path: Path, name: str, resume: bool) -> None:
    partial = start(tmp_path / "out")
    put(partial / "work", "half")
    mine = partial / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(OutputError, match=f"{name} is nothing that sculptor wrote"):
        start(tmp_path / "out", overwrite=not resume, resume=resume)
    assert mine.read_text() == "mine"
    assert (partial / "work").read_text() == "half"


@pytest.mark.parametrize("link", ["work", LOCK_NAME, MARKER_NAME, "state"])
def test_a_link_in_a_staging_directory_is_not_followed(tmp_path: Path, link: str) -> None:
    partial = start(tmp_path / "out")
    mine = tmp_path / ("folder" if link == "state" else "file")
    if link == "state":
        mine.mkdir()
    else:
        mine.write_text("mine")
    (partial / link).unlink(missing_ok=True)
    (partial / link).symlink_to(mine)
    with pytest.raises(OutputError, match=f"{link} is nothing that"):
        start(tmp_path / "out", overwrite=True)
    assert mine.is_dir() or mine.read_text() == "mine"


@pytest.mark.parametrize("how", ["error", "success", "placed whole"])
def test_a_file_that_comes_while_a_run_works_is_kept(tmp_path: Path, how: str) -> None:
    output = tmp_path / "out"
    partial = partial_path(output)
    with (
        suppress(KeyboardInterrupt),
        staging(output, command="analyze", overwrite=False, resume=False, worth_keeping=lambda _: False),
    ):
        put(partial / "state" / "step")
        (partial / "notes.txt").write_text("mine")
        if how == "error":
            raise KeyboardInterrupt
        if how == "success":
            discard(partial)
        else:
            commit(partial, output, overwrite=False)
    if how == "placed whole":
        with pytest.raises(OutputError, match=r"holds notes\.txt, which sculptor did not write"):
            start(output, overwrite=True)
        assert (output / "notes.txt").read_text() == "mine"
    else:
        assert [item.name for item in partial.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("size", [10, 3 * 2**20])
@pytest.mark.parametrize("change", ["content", "link", "folder"])
def test_overwrite_tells_its_own_files_by_content(tmp_path: Path, size: int, change: str) -> None:
    """A card that somebody wrote in the place of ours, another model copied over it."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_bytes(bytes(size))
    ours(output, "sculptor.json")
    start(output, overwrite=True)
    (output / "README.md").unlink()
    if change == "folder":
        (output / "README.md").mkdir()
        (output / "README.md" / "mine").write_text("")
    elif change == "link":
        (tmp_path / "mine").write_bytes(bytes(size))
        (output / "README.md").symlink_to(tmp_path / "mine")
    else:
        (output / "README.md").write_bytes(bytes(size - 1) + b"x")
    with pytest.raises(OutputError, match=r"holds (another )?README\.md"):
        start(output, overwrite=True)
    assert (output / "README.md").exists()


def test_a_copy_of_an_output_is_one(tmp_path: Path) -> None:
    """Dates do not tell."""
    (tmp_path / "out").mkdir()
    ours(tmp_path / "out", "sculptor.json")
    (tmp_path / "copy").mkdir()
    for file in (tmp_path / "out").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    start(tmp_path / "copy", overwrite=True)


@pytest.mark.parametrize("name", [".sculptor.tmp", "work.tmp", "state/step.tmp"])
def test_what_a_killed_run_was_writing_is_its_own(tmp_path: Path, name: str) -> None:
    partial = start(tmp_path / "out")
    put(partial / name, "ha")
    start(tmp_path / "out", resume=True)
    start(tmp_path / "out", overwrite=True)
    assert not (partial / name).exists()


def test_a_place_that_cannot_be_locked_inside_another_is_known_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a task of a sequence, when the disk is full at just that moment."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    partial = start(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("filelock.FileLock.acquire", full)
        with pytest.raises(OutputError, match="No space left"):
            start(partial / "01-one")
    assert (partial / "01-one.partial" / MARKER_NAME).is_file()
    start(start(tmp_path / "out", resume=True) / "01-one", resume=True)
    start(tmp_path / "out", overwrite=True)
    assert not (partial / "01-one.partial").exists()


def test_a_note_that_was_cut_off_hides_no_other(tmp_path: Path) -> None:
    """A full disk writes half of a line; what another thread notes then stands behind it."""
    partial = partial_path(tmp_path / "out")

    def interrupted() -> None:
        with staging(tmp_path / "out", command="test", overwrite=False, resume=False, worth_keeping=lambda _: False):
            ours(partial, "first.txt")
            with open(partial / MARKER_NAME, "a") as marker:
                marker.write('"sec')
            ours(partial, "third.txt")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert not partial.exists()


def test_what_replaces_something_is_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, seen = tmp_path / "out", list[str]()

    def failing(place: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{place}"))
        raise OSError(5, "Input/output error")

    for text in ("old", "new"):
        monkeypatch.setattr(os, "fsync", failing if text == "new" else os.fsync)
        with suppress(OutputError), one_pass(output, command="test", overwrite=True) as staged:
            note(staged / "a.txt")
            (staged / "a.txt").write_text(text)
    assert (output / "a.txt").read_text() == "old"
    assert len(seen) == 1


@pytest.mark.parametrize("resume", [True, False])
def test_who_is_writing_is_told_before_what_is_left_over(tmp_path: Path, resume: bool) -> None:
    with staging(
        tmp_path / "out", command="test", overwrite=False, resume=False, worth_keeping=lambda _: False
    ) as partial:
        ours(partial, "first.txt")
        with pytest.raises(OutputError, match="another run is writing there"):
            check_free(tmp_path / "out", command="test", overwrite=False, resume=resume)


def test_nothing_to_go_on_with_is_said(tmp_path: Path) -> None:
    for resume, told in ((False, "nothing was done yet that --resume could go on with"), (None, "stopped by SIGTERM$")):
        with (
            pytest.raises(Interrupted, match=told),
            staging(tmp_path / "out", command="test", overwrite=False, resume=resume, worth_keeping=lambda _: False),
        ):
            raise Interrupted(signal.SIGTERM)


def test_space_is_no_remedy_for_what_is_not_allowed() -> None:
    assert remedy_of(PermissionError(errno.EACCES, "no")) == "choose another place"
    assert remedy_of(OSError(errno.ENOSPC, "full")) == "free some space or choose another place"


def test_a_folder_that_cannot_be_waited_for_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems; files are waited for all the same, and a pipe is not."""
    (tmp_path / "a.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    seen, sync = list[str](), os.fsync

    def picky(place: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{place}")).name)
        if os.path.isdir(f"/proc/self/fd/{place}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(place)

    monkeypatch.setattr(os, "fsync", picky)
    make_durable(tmp_path)
    assert sorted(seen) == sorted(["a.txt", tmp_path.name])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        make_durable(tmp_path)
