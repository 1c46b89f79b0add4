"""Tables fit 100 columns, pictures are drawn, JSON has what was promised."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, analyze
from sculptor.archive.store import Archive
from sculptor.errors import OutputError
from sculptor.report.plot import check_picture, plot_archive
from sculptor.report.text import WIDTH, size, table

COVERS = ["sculptor.report.plot"]


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Path]:
    model = save_checkpoint(tmp_path / "model", "t5")  # the longest names
    analyze(model, tmp_path / "archive", AnalyzeSettings(preserve=0.5, device="cpu"))
    return {"model": model, "archive": tmp_path / "archive", "data": write_rows(tmp_path / "d.jsonl", task_rows())}


def test_everything_fits_100_columns(cli: Callable[..., Result], made: dict[str, Path], tmp_path: Path) -> None:
    short = Path("out")
    trained = cli(
        "train", made["model"], "--subspaces", made["archive"], "--data", made["data"], "-o", tmp_path / short,
        "--max-steps", 2, "--device", "cpu",
    )  # fmt: skip
    outputs = [
        trained,
        cli("inspect", made["archive"]),
        cli("inspect", made["archive"], "--all"),
        cli("inspect", tmp_path / short / "subspaces", "--compare", made["archive"]),
        cli("verify", made["model"], tmp_path / short, "--subspaces", made["archive"], "--device", "cpu"),
        cli("evaluate", made["model"], "--data", made["data"], "--device", "cpu"),
        cli("analyze", made["model"], "-o", tmp_path / "again", "--basis", "weights", "--device", "cpu"),
    ]
    for found in outputs:
        assert found.code == 0, found.err
        tables = [line for line in found.out.splitlines() if str(tmp_path) not in line]
        assert max(map(len, tables)) <= WIDTH, max(tables, key=len)
        assert found.err == ""


def test_verify_json_has_the_promised_keys(cli: Callable[..., Result], made: dict[str, Path]) -> None:
    verified = cli("verify", made["model"], made["model"], "--subspaces", made["archive"], "--json").json
    keys = {"passed", "leak", "max_leak", "rounding", "num_targets", "untouched_identical"}
    assert keys <= verified.keys()
    evaluated = cli("evaluate", made["model"], "--data", made["data"], "--json").json
    assert {"loss", "perplexity", "accuracy", "exact_match", "num_rows", "num_tokens"} <= evaluated.keys()


def test_inspect_sums_up_by_role_and_block_and_shows_matrices_when_asked(
    cli: Callable[..., Result], made: dict[str, Path]
) -> None:
    """Of both stacks; what is free adds up to the same."""
    inspected = cli("inspect", made["archive"], "--json").json
    blocks = [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
    assert [block["role"] for block in inspected["blocks"]] == blocks
    for key in ("num_matrices", "num_free", "num_parameters"):
        assert sum(block[key] for block in inspected["blocks"]) == sum(role[key] for role in inspected["roles"])
    for block in inspected["blocks"]:
        inside = [each for each in inspected["matrices"] if each["name"].startswith(block["role"] + ".")]
        assert len(inside) == block["num_matrices"]
        assert sum(each["preserved"] for each in inside) / len(inside) == pytest.approx(block["preserved"])
    short, every = cli("inspect", made["archive"]).out, cli("inspect", made["archive"], "--all").out
    names = [matrix["name"] for matrix in inspected["matrices"]]
    assert all(f"\n{block} " in short for block in blocks)
    assert not any(name in short for name in names)
    assert every.startswith(short.rstrip("\n"))
    assert all(name in every for name in names)
    idle = cli("inspect", made["archive"], "--all", "--json")
    assert (idle.code, "--all without effect" in idle.err) == (2, True)


def test_a_picture_is_drawn_whole_or_not_at_all(
    cli: Callable[..., Result], made: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("matplotlib")
    found = cli("inspect", made["archive"], "--plot", tmp_path / "p.png")
    assert found.code == 0, found.err
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    check_picture(tmp_path / "p.png", overwrite=True)
    with pytest.raises(OutputError, match="exists already; choose another --plot or pass --overwrite"):
        check_picture(tmp_path / "p.png", overwrite=False)
    (tmp_path / "mine.png").write_bytes(b"\x89PNG of mine")
    with pytest.raises(OutputError, match="exists already, and was not written by sculptor"):
        check_picture(tmp_path / "mine.png", overwrite=True)
    wrong = cli("inspect", made["archive"], "--plot", tmp_path / "p.gif7")
    assert wrong.code == 2
    assert "unknown picture format" in wrong.err
    before, names = (tmp_path / "p.png").read_bytes(), sorted(tmp_path.iterdir())
    request.getfixturevalue("small_disk")
    failed = cli("inspect", made["archive"], "--plot", tmp_path / "p.png", "--overwrite", "--html", tmp_path / "x.html")
    assert (failed.code, failed.err.count("error: "), "cannot write" in failed.err) == (1, 1, True)
    assert ((tmp_path / "p.png").read_bytes(), sorted(tmp_path.iterdir())) == (before, names)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["svg", "pdf", "ps", "eps"])
def test_pictures_say_who_made_them(made: dict[str, Path], tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    for _ in range(2):  # the second over the first
        plot_archive(Archive(made["archive"]), tmp_path / f"p.{ending}")
    check_picture(tmp_path / f"p.{ending}", overwrite=True)


def test_long_first_cells_are_shortened_from_the_left() -> None:
    text = table(["name", "value"], [["x" * 200 + "tail", "1"]])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" in text
    assert "tail" in text


def test_sizes_are_for_people() -> None:
    assert [size(n) for n in (999, 1000, 2_500_000, 3 * 10**12)] == ["999 B", "1.0 kB", "2.5 MB", "3.0 TB"]
