"""--push-to-hub, against a hub that writes down what it is asked."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows
from edited import save_tuned
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

import sculptor
from sculptor import AnalyzeSettings, analyze
from sculptor.errors import CheckpointError, OutputError


class Missing(RepositoryNotFoundError):
    """As the client raises it, without an answer of a server."""

    def __init__(self) -> None:
        Exception.__init__(self, "404")

    def __str__(self) -> str:
        return "404"


class Hub:
    """In the place of HfApi.

    Attributes:
        calls: what would have changed something.
        there: private or not, and files of a repository that is there.
        fails: name of a call that fails.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.there: tuple[bool, tuple[str, ...]] | None = None
        self.fails: str | None = None

    def whoami(self) -> dict[str, str]:
        if self.fails == "whoami":
            raise LocalTokenNotFoundError("no token\nsecond line")
        return {"name": "owner"}

    def model_info(self, name: str) -> Any:
        if self.there is None:
            raise Missing
        private, files = self.there
        return SimpleNamespace(private=private, siblings=[SimpleNamespace(rfilename=file) for file in files])

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.calls.append(("create", (name, private)))
        return f"https://hub/{name}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str
    ) -> None:
        if self.fails == "upload_folder":
            raise ConnectionError("gone")
        held = {path.name for path in Path(folder_path).iterdir()} - set(ignore_patterns)
        self.calls.append(("upload", (repo_id, held)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("push")
    save_tuned(save_checkpoint(path / "base"), path / "tuned")
    write_rows(path / "task.jsonl", task_rows())
    analyze(path / "base", path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return path


def run(cli: Callable[..., Result], made: Path, output: Path, *more: object) -> Result:
    task = ("--data", made / "task.jsonl", "--max-steps", 2, "--device", "cpu")
    return cli("train", made / "base", "--subspaces", made / "archive", *task, "-o", output, *more)


@pytest.mark.parametrize("public", [False, True])
def test_a_training_is_pushed_private_unless_asked(
    cli: Callable[..., Result], made: Path, tmp_path: Path, hub: Hub, public: bool
) -> None:
    found = run(cli, made, tmp_path / "out", "--push-to-hub", "owner/new", *(["--public"] if public else []))
    assert found.code == 0, found.err
    (create, upload) = hub.calls
    assert create == ("create", ("owner/new", not public))
    repository, held = upload[1]
    assert repository == "owner/new"
    assert held >= {"README.md", "config.json", "model.safetensors", "sculptor.json", "subspaces"}
    assert ".sculptor" not in held
    assert "Pushed to https://hub/owner/new." in found.err


def test_edits_are_pushed(cli: Callable[..., Result], made: Path, tmp_path: Path, hub: Hub) -> None:
    place = ("-o", tmp_path / "a", "--device", "cpu", "--push-to-hub", "owner/a")
    assert cli("edit", "interpolate", made / "base", made / "tuned", "--alpha", 0.5, *place).code == 0
    assert (
        cli(
            "edit", "prune", made / "base", "--by", "magnitude", "--sparsity", 0.3, "-o", tmp_path / "b", *place[4:]
        ).code
        == 0
    )
    assert [name for name, _ in hub.calls] == ["create", "upload"] * 2


def test_nothing_is_pushed_of_a_run_that_fails(
    cli: Callable[..., Result], made: Path, tmp_path: Path, hub: Hub
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert run(cli, made, tmp_path / "out", "--push-to-hub", "owner/new").code == 1
    assert hub.calls == []


@pytest.mark.parametrize(
    ("there", "fails", "more", "code", "words"),
    [
        (None, "whoami", (), 1, ("LocalTokenNotFoundError: no token", "hf auth login")),
        ((False, ()), None, (), 1, ("owner/new: is there and public; pass --public",)),
        ((True, (".gitattributes", "a.txt")), None, (), 1, ("holds files (a.txt)", "--overwrite")),
        (None, None, ("--push-to-hub", "new"), 2, ("expected OWNER/NAME",)),
        (None, None, ("--push-to-hub", "a/b/c"), 2, ("expected OWNER/NAME",)),
        (None, None, ("--push-to-hub", "owner/.."), 2, ("expected OWNER/NAME",)),
    ],
)
def test_what_cannot_be_pushed_is_told_before_the_work(
    cli: Callable[..., Result],
    made: Path,
    tmp_path: Path,
    hub: Hub,
    there: Any,
    fails: str | None,
    more: tuple[str, ...],
    code: int,
    words: tuple[str, ...],
) -> None:
    hub.there, hub.fails = there, fails
    found = run(cli, made, tmp_path / "out", "--push-to-hub", "owner/new", *more)
    assert found.code == code
    assert found.err.count("\n") == 1
    assert all(word in found.err for word in words), found.err
    assert list(tmp_path.iterdir()) == []
    assert hub.calls == []


def test_what_is_there_is_pushed_over_when_asked(
    cli: Callable[..., Result], made: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.there = (True, ("a.txt",))
    assert run(cli, made, tmp_path / "out", "--push-to-hub", "owner/new", "--overwrite").code == 0
    hub.there = (False, ())
    assert run(cli, made, tmp_path / "two", "--push-to-hub", "owner/new", "--public").code == 0
    assert [name for name, _ in hub.calls] == ["create", "upload"] * 2


def test_a_push_that_fails_leaves_the_output_and_says_how_to_go_on(
    cli: Callable[..., Result], made: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.fails = "upload_folder"
    found = run(cli, made, tmp_path / "out", "--push-to-hub", "owner/new")
    assert found.code == 1
    assert f"hf upload --private owner/new {tmp_path / 'out'}" in found.err
    assert "Wrote" in found.out
    assert (tmp_path / "out" / "README.md").is_file()


def test_options_without_effect(cli: Callable[..., Result], made: Path, tmp_path: Path, hub: Hub) -> None:
    found = run(cli, made, tmp_path / "out", "--public")
    assert (found.code, found.err) == (2, "error: --public without effect without --push-to-hub\n")
    dry = ("--alpha", 0.5, "--dry-run", "--push-to-hub", "owner/new")
    found = cli("edit", "interpolate", made / "base", made / "tuned", *dry)
    assert (found.code, found.err) == (2, "error: --push-to-hub without effect: nothing is written\n")
    assert list(tmp_path.iterdir()) == []


def test_from_python(made: Path, tmp_path: Path, hub: Hub) -> None:
    assert sculptor.push(made / "tuned", "owner/new") == "https://hub/owner/new"
    assert hub.calls[0] == ("create", ("owner/new", True))
    with pytest.raises(CheckpointError):
        sculptor.push(tmp_path, "owner/new")
    hub.there = (False, ())
    with pytest.raises(OutputError, match="public"):
        sculptor.push(made / "tuned", "owner/new")
    assert len(hub.calls) == 2
