"""Bad input of every kind ends in one line, exit 1 or 2, and leaves nothing that looks finished."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.kill import COMMAND
from conftest import Result, save_checkpoint, task_rows, write_rows
from safetensors.torch import load_file, save_file

from sculptor.checkpoint.written import fingerprint


@pytest.fixture
def made(tmp_path: Path, cli: Callable[..., Result]) -> dict[str, Path]:
    model = save_checkpoint(tmp_path / "model")
    assert cli("analyze", model, "-o", tmp_path / "archive", "--preserve", 0.5, "--device", "cpu").code == 0
    data = write_rows(tmp_path / "task.jsonl", task_rows())
    return {"model": model, "archive": tmp_path / "archive", "data": data, "out": tmp_path / "out"}


def one_line(found: Result, *needles: str, code: int = 1) -> None:
    assert found.code == code, (found.code, found.err)
    lines = found.err.strip().splitlines()
    assert len(lines) == 1, found.err
    assert lines[0].startswith("error: ")
    for needle in needles:
        assert needle in lines[0]


def train(cli: Callable[..., Result], made: dict[str, Path], *more: object, **changes: Path) -> Result:
    paths = made | changes
    return cli(
        "train", paths["model"], "--subspaces", paths["archive"], "--data", paths["data"], "-o", paths["out"],
        "--max-steps", 2, "--device", "cpu", *more,
    )  # fmt: skip


def nothing_finished(path: Path) -> None:
    assert not path.exists()


def test_models(cli: Callable[..., Result], made: dict[str, Path], tmp_path: Path) -> None:
    for command in (("analyze", "-o", made["out"]), ("evaluate", "--data", made["data"])):
        one_line(cli(command[0], tmp_path / "nowhere", *command[1:]), "no such directory")
        (tmp_path / "empty").mkdir(exist_ok=True)
        one_line(cli(command[0], tmp_path / "empty", *command[1:]), "empty directory")
    nothing_finished(made["out"])


def test_nan_weights_name_the_tensor(cli: Callable[..., Result], made: dict[str, Path]) -> None:
    file = made["model"] / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][1, 1] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    analyze = ("analyze", made["model"], "-o", made["out"], "--basis", "weights", "--device", "cpu")
    one_line(cli(*analyze), name, "NaN or infinite")
    nothing_finished(made["out"])


def test_archives(cli: Callable[..., Result], made: dict[str, Path], tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=3)
    one_line(train(cli, made, model=other), "archive of another checkpoint", "sculptor analyze")
    one_line(train(cli, made, archive=tmp_path / "nowhere"), "no archive.json")
    one_line(cli("verify", other, other, "--subspaces", made["archive"]), "another checkpoint", code=2)
    one_line(cli("verify", made["model"], tmp_path / "nowhere", "--subspaces", made["archive"]), "no such", code=2)
    one_line(cli("inspect", made["archive"], "--model", other), "another checkpoint")
    manifest = made["archive"] / "archive.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"version": 1}))
    one_line(train(cli, made), "archive version 1")
    manifest.write_text(manifest.read_text()[:100])
    one_line(train(cli, made), "damaged")
    nothing_finished(made["out"])


@pytest.mark.parametrize(
    ("line", "needle"),
    [('{"prompt": "x"', "broken JSON"), ('{"instruction": "x"}', "'instruction'"), ('{"text": "w1"}', "empty after")],
)
def test_rows_name_file_and_line(cli: Callable[..., Result], made: dict[str, Path], line: str, needle: str) -> None:
    with made["data"].open("a") as file:
        file.write(line + "\n")
    one_line(train(cli, made), f"{made['data']}:25", needle)
    nothing_finished(made["out"])
    nothing_finished(made["out"].with_name("out.partial"))


def test_existing_outputs_are_kept(cli: Callable[..., Result], made: dict[str, Path]) -> None:
    made["out"].mkdir()
    (made["out"] / "precious").write_text("x")
    files, rows = {"precious": fingerprint(made["out"] / "precious")}, made["data"].read_text()
    (made["out"] / ".sculptor").write_text(json.dumps({"files": files}))
    one_line(train(cli, made), "exists already", "--overwrite")
    one_line(cli("analyze", made["model"], "-o", made["out"]), "exists already")
    made["data"].write_text("nothing of this is read")  # what takes time comes after
    for more in (("--subspaces", made["archive"]), ()):
        said = cli("train", made["model"], *more, "--data", made["data"], "-o", made["out"], "--device", "cpu")
        one_line(said, "exists already")
    measured = ("--basis", "curvature", "--data", made["data"])
    one_line(cli("analyze", made["model"], *measured, "-o", made["out"], "--device", "cpu"), "exists already")
    labelled = ("train", made["model"], "--data", made["data"], "--task", "sequence-classification", "-o", made["out"])
    one_line(cli(*labelled, "--device", "cpu"), "exists already")
    made["data"].write_text(rows)
    inside = made["archive"] / "archive.json" / "x"
    for more in (("--subspaces", made["archive"]), ()):
        said = cli("train", made["model"], *more, "--data", made["data"], "-o", inside, "--device", "cpu")
        one_line(said, "archive.json is a file, and no directory; choose another --output" if not more else "input")
    assert (made["out"] / "precious").read_text() == "x"
    assert train(cli, made, "--overwrite").code == 0
    assert not (made["out"] / "precious").exists()


def test_a_place_that_cannot_be_written(cli: Callable[..., Result], made: dict[str, Path]) -> None:
    one_line(train(cli, made, out=Path("/proc/nowhere/out")), "cannot write")
    one_line(cli("analyze", made["model"], "-o", "/proc/nowhere/out"), "cannot write")


@pytest.mark.slow
def test_a_disk_that_fills_up(made: dict[str, Path]) -> None:
    """A limit on file size stands for the full disk; both commands stop with one line."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
    )
    command = [COMMAND[0], "-c", limit + COMMAND[2]]
    arguments = {
        "analyze": [str(made["model"]), "--preserve", "0.5"],
        "train": [
            str(made["model"]),
            "--subspaces",
            str(made["archive"]),
            "--data",
            str(made["data"]),
            "--max-steps",
            "2",
        ],
    }
    for name, rest in arguments.items():
        found = subprocess.run(
            [*command, name, *rest, "-o", str(made["out"])], capture_output=True, text=True, env={**os.environ}
        )
        assert found.returncode == 1, found.stderr
        said = [line for line in found.stderr.splitlines() if not line.startswith("chosen: ")]
        assert len(said) == 1, found.stderr
        assert "cannot write" in said[0]
        nothing_finished(made["out"])
        subprocess.run(["rm", "-rf", str(made["out"]) + ".partial"], check=True)


def test_settings(cli: Callable[..., Result], made: dict[str, Path]) -> None:
    analyze = ("analyze", made["model"], "-o", made["out"])
    one_line(cli(*analyze, "--preserve", 1.5), "'--preserve': 1.5 is not in the range 0<=x<=1", code=2)
    one_line(cli(*analyze, "--preserve", 1), "--preserve 1", code=2)
    one_line(cli(*analyze, "--rule", "mask", "--rank", 4), "--rank without effect with --rule mask", code=2)
    one_line(cli(*analyze, "--rule", "lowrank", "--rank", 40), "--rank 40: a matrix has 32 inputs", code=2)
    one_line(cli(*analyze, "--targets", "q_prj"), "'q_prj' matches none of the 14", code=2)
    one_line(train(cli, made, "--max-steps", 0), "'--max-steps': 0 is not in the range x>=1", code=2)
    one_line(train(cli, made, "--max-length", 999), "--max-length 999 is more than the 64", code=2)
    one_line(train(cli, made, "--device", "nonsense"), "--device nonsense", code=2)
    nothing_finished(made["out"])


def test_misspelling_suggests_the_nearest(cli: Callable[..., Result], made: dict[str, Path]) -> None:
    analyze = ("analyze", made["model"], "-o", made["out"])
    one_line(cli(*analyze, "--presrve", 0.5), "--presrve", "Did you mean '--preserve'?", code=2)
    one_line(cli(*analyze, "--constraint", "dubble"), "Did you mean 'double'?", code=2)
    one_line(cli(*analyze, "--rule", "masks"), "Did you mean 'mask'?", code=2)
    one_line(cli("anlyze"), "Did you mean 'analyze'?", code=2)
    one_line(cli("train", "x"), "--data", code=2)
    one_line(cli(*analyze, "--preserve", "half"), "half", code=2)


def test_several_processes_where_there_is_nothing_to_share(made: dict[str, Path]) -> None:
    for rank in ("0", "1"):
        environment = os.environ | {"WORLD_SIZE": "2", "RANK": rank}
        found = subprocess.run(
            [*COMMAND, "inspect", str(made["archive"])], capture_output=True, text=True, env=environment, timeout=60
        )
        assert found.returncode == 2, found.stderr
        assert found.stderr.count("\n") == (1 if rank == "0" else 0)
        assert "2 processes" in found.stderr or rank == "1"


def test_odd_outputs(cli: Callable[..., Result], made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(cli("analyze", made["model"], "-o", "x" * 300), "cannot write")
    one_line(cli("analyze", made["model"], "-o", made["model"], "--overwrite"), "is or holds the input")
    one_line(train(cli, made, "--overwrite", out=made["model"].parent), "is or holds the input")
    (made["model"].parent / "here").mkdir()
    monkeypatch.chdir(made["model"].parent / "here")
    one_line(cli("analyze", made["model"], "-o", "."), "exists already")
    assert (made["model"] / "model.safetensors").is_file()


@pytest.mark.slow
def test_stdout_that_cannot_be_written(made: dict[str, Path]) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [*COMMAND, "inspect", str(made["archive"])], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert found.returncode == 1
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr


@pytest.mark.slow
def test_a_stdout_that_stays_full_does_not_change_the_exit_code(made: dict[str, Path]) -> None:
    lines = (
        "import io, sys",
        "class Full(io.StringIO):",
        "    def flush(self):",
        "        raise OSError(28, 'No space left on device')",
        "sys.stdout = Full()",
        COMMAND[-1],
    )
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), "inspect", str(made["archive"])], capture_output=True, text=True
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error: output: No space left on device")
    rest = found.stderr.strip().splitlines()[1:]  # the oldest tqdm may add what it ignored at the end
    assert not rest or "tqdm" in rest[0], found.stderr
    assert not any(line.startswith("error") for line in rest)


def test_a_picture_is_not_overwritten(cli: Callable[..., Result], made: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "p.png").write_text("precious")
    one_line(cli("inspect", made["archive"], "--plot", tmp_path / "p.png"), "exists already")
    assert (tmp_path / "p.png").read_text() == "precious"


def test_names_used_elsewhere_are_understood(cli: Callable[..., Result]) -> None:
    one_line(cli("train", "m", "--lr", 1), "Did you mean '--learning-rate'?", code=2)


def test_a_closed_stdout_is_no_error(made: dict[str, Path]) -> None:
    command = " ".join(map(shlex.quote, [*COMMAND, "inspect", str(made["archive"])]))
    found = subprocess.run(["sh", "-c", f"{command} >&-"], stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (0, "")


LONG = "/x" + "y" * 1500 + "/" + "long name " * 150 + "END"


@pytest.mark.parametrize(
    "arguments",
    [
        ["analyze", LONG, "-o", "out"],
        ["analyze", LONG.replace("/", "a"), "-o", "out"],
        ["analyze", "owner/" + "n" * 3000, "-o", "out"],
        ["inspect", LONG],
        ["evaluate", "MODEL", "--data", LONG],
        ["evaluate", "MODEL", f"--data={LONG}"],
        ["analyze", "MODEL", "-o", LONG, "--device", "cpu"],
        ["analyze", "MODEL", "-o", "out", "--basis", LONG],
        ["analyze", "MODEL", "-o", "out", "--device", LONG],
        ["analyze", "MODEL", "-o", "out", "--targets", LONG],
        ["analyze", "MODEL", "-o", "out", "--targets", "(" * 3000],
        ["analyze", "MODEL", "-o", "out", "--preserve", LONG],
        ["analyze", f"--{LONG}"],
        [LONG],
        ["continual", LONG, "-o", "out"],
        ["estimate", "MODEL", "--subspaces", LONG],
        ["verify", "MODEL", LONG, "--subspaces", "MODEL"],
    ],
)
def test_what_somebody_made_long_is_quoted_briefly(
    cli: Callable[..., Result], tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "MODEL")
    found = cli(*arguments)
    assert found.code in (1, 2)
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert len(found.err) < 620
    assert max(map(len, found.err.split())) <= 200
    assert found.err.count("long name") < 25


def test_an_output_lies_in_nothing_that_is_read(
    cli: Callable[..., Result], made: dict[str, Path], tmp_path: Path
) -> None:
    """What is read would be another directory then; through links and `..`, too."""
    model, archive, folder = made["model"], made["archive"], tmp_path / "rows"
    folder.mkdir()
    rows = write_rows(folder / "task.jsonl", task_rows())
    (tmp_path / "plan.toml").write_text(
        f'model = "model"\n[train]\nmax_steps = 1\n[[tasks]]\nname = "a"\ndata = ["{rows}"]\ntest = ["{rows}"]\n'
    )
    (tmp_path / "link").symlink_to(model)
    before = sorted(tmp_path.rglob("*"))
    for output in (model / "out", tmp_path / "link" / "out", archive / ".." / "model" / "deep" / "out"):
        one_line(cli("analyze", model, "--preserve", 0.5, "-o", output), "lies in the input", str(model))
    for place, data in ((archive, rows), (model, rows), (folder, folder)):
        found = train(cli, made, out=place / "out", data=data)
        one_line(found, "lies in the input", str(place))
    one_line(cli("continual", tmp_path / "plan.toml", "-o", model / "out"), "lies in the input", str(model))
    one_line(cli("edit", "interpolate", model, model, "--alpha", 1, "-o", model / "out"), "lies in the input")
    one_line(
        cli("edit", "prune", model, "--by", "magnitude", "--sparsity", 0.5, "-o", model / "out"), "lies in the input"
    )
    one_line(cli("convert", archive, "--model", model, "-o", archive / "out"))
    one_line(cli("inspect", archive, "--html", archive / "page.html"), "lies in the input", str(archive))
    card = ("card", model, model, "--data", rows, "--overwrite", "--json")
    one_line(cli(*card, rows), "is or holds the input", str(rows), code=2)
    one_line(cli(*card, model / "config.json"), "lies in the input", str(model), code=2)
    one_line(
        cli("verify", model, model, "--subspaces", archive, "--html", model / "page.html"), "lies in the input", code=2
    )
    one_line(cli("evaluate", model, "--data", folder, "--html", folder / "page.html"), "lies in the input", str(folder))
    for option in ("--protect-data", "--replay"):
        page = ("train", model, "--data", rows, option, folder, "-o", tmp_path / "out", "--html", folder / "page.html")
        one_line(cli(*page), "lies in the input", str(folder))
    assert sorted(tmp_path.rglob("*")) == before
