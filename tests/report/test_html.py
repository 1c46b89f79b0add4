"""Pages for a browser: well formed, whole, safe whatever names are, and written as other outputs are."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from conftest import Result, save_checkpoint, task_rows, write_rows

from sculptor import AnalyzeSettings, analyze
from sculptor.analysis.verify import MatrixVerification, Verification
from sculptor.benchmark.results import ContinualReport, Stage
from sculptor.errors import OutputError
from sculptor.evaluation.answers import Answer
from sculptor.evaluation.matrix import continual_metrics
from sculptor.evaluation.rows import NOTHING, Watched
from sculptor.model.harm import Harm
from sculptor.numerics.staircase import Staircase
from sculptor.report.html import style
from sculptor.report.html.continual import continual_page
from sculptor.report.html.curves import Curve, chart, staircase
from sculptor.report.html.evaluate import evaluate_page
from sculptor.report.html.page import page, write_page
from sculptor.report.html.verify import verify_page
from sculptor.report.text import percent

COVERS = [
    "sculptor.report.html.continual",
    "sculptor.report.html.curves",
    "sculptor.report.html.figures",
    "sculptor.report.html.heat",
    "sculptor.report.html.inspect",
    "sculptor.report.html.page",
    "sculptor.report.html.style",
    "sculptor.report.html.train",
    "sculptor.report.html.verify",
]
BAD = "</style></title></script><script>alert(\"1\")</script><img src=x onerror='a()'>&amp;\x00\u202e\udcff"
SHOWN = BAD.replace("\x00", "\\x00").replace("\u202e", "\\u202e").replace("\udcff", "\\udcff")
SCARY = "<script>alert(1)&\"'.jsonl"
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "article", "figure"),
    *("figcaption", "details", "summary", "h1", "h2", "h3", "p", "div", "span", "small", "strong", "b", "i", "code", "pre", "wbr"),
    *("ul", "ol", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "svg", "line", "polyline", "polygon"),
}  # fmt: skip


class Read(HTMLParser):
    """A page as a browser sees it: its text, its attributes, the rows of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.said: list[str] = []
        self.titles: list[str] = []
        self.rows: list[list[str]] = []
        self.classes: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = "\n".join(self.said)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        given = dict(attrs)
        assert len(given) == len(attrs)
        assert not {"src", "href", "srcset", "action", "data"} & given.keys()
        assert not any(name.startswith("on") for name in given)
        self.titles.append(given.get("title") or "")
        self.classes += (given.get("class") or "").split()
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if tag == "svg":
            assert given["role"] == "img"
            assert given["aria-label"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert not re.search(r"url\(|@import|expression|://", data)
            return
        self.said.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def looked_at(path: Path) -> Read:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>\n<html lang=")
    assert "default-src 'none'" in text
    assert "prefers-color-scheme:dark" in text
    return Read(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two stacks and its archive, rows in a file with a name to be afraid of."""
    path = tmp_path_factory.mktemp("html")
    save_checkpoint(path / "model", "t5")
    analyze(path / "model", path / "subspaces", AnalyzeSettings(preserve=0.5, device="cpu"))
    for name in ("task.jsonl", SCARY):
        write_rows(path / name, task_rows())
    return path


@pytest.fixture(scope="module")
def verification() -> Verification:
    """Two experts that fail among others, one matrix that did not change, and everything else that can be wrong."""
    matrices = [
        MatrixVerification(f"model.layers.{i}.experts.{e}.up.weight", "experts.up", 0.02, 1e-6, 1e-6, 0.0, True)
        for i in range(2)
        for e in range(12)
    ]
    matrices[3] = replace(matrices[3], leak=0.31, holds=False)
    matrices[4] = replace(matrices[4], leak=0.01, rounding=0.0, holds=False)
    still = MatrixVerification("model.layers.0.q.weight", "q", 0.0, 0.0, 0.0, 0.0, True)
    return Verification(
        passed=False, leak=0.02, max_leak=0.31, rounding=1e-6, eaten=0.1, num_targets=25, num_changed=24,
        untouched_identical=False, num_untouched=7, changed_elsewhere=(BAD,), differences=(BAD,), also_trained=(BAD,),
        num_merges=1, num_claimed=3, doubt=BAD, strict=True, cast="float32", matrices=(*matrices, still), kept=-0.2,
        harm=Harm(0.0123, 0.0004, 0.21, 0.03, 64, 900),
    )  # fmt: skip


def sequence(num_tasks: int, metric: str = "accuracy") -> ContinualReport:
    names = tuple(f"a task with a really long name that ends in {i}" for i in range(num_tasks))
    sign = -1 if metric == "loss" else 1
    matrix = tuple(tuple(sign * (0.2 + 0.05 * i + 0.01 * j) for j in range(num_tasks)) for i in range(num_tasks + 1))
    stages = tuple(
        Stage(name, {}, 3.0, 1000, 12.0, {BAD: 3 + i / 7, "/home/me/wiki.txt": 2.5})
        for i, name in enumerate(("base", *names))
    )
    return ContinualReport(
        Path("/home/me/run"), "sculptor", "curvature", "test", 0, names, metric, matrix, continual_metrics(matrix), 0.1, stages
    )  # fmt: skip


def test_commands_of_the_page_write_pages_of_their_figures(
    cli: Callable[..., Result], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    page_text = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```", page_text, re.M | re.S)
    commands = {line.split()[1]: line.split()[2:] for line in block.splitlines()}
    assert list(commands) == ["inspect", "train", "verify", "evaluate"]

    def run(name: str, *more: object) -> tuple[Any, Read]:
        found = cli(name, *commands[name], *more, "--json")
        assert (found.code, found.err) == (0, f"Wrote {commands[name][-1]}.\n")
        read = looked_at(Path(commands[name][-1]))
        assert str(made) not in read.text + "".join(read.titles)  # nobody's folders
        return found.json, read

    report, seen = run("train", "--data", made / SCARY, "--max-steps", 3, "--device", "cpu")
    metrics = [json.loads(line) for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    losses = [[f"{line['step']}", f"{line['loss']:.4g}"] for line in metrics if "loss" in line]
    assert len(losses) == 3
    assert all(row in seen.rows for row in losses)
    assert all([f"{line['step']}", f"{line['eval_loss']:.4g}"] in seen.rows for line in metrics if "eval_loss" in line)
    for name, matrix in report["matrices"].items():
        row = next(row for row in seen.rows if row[0] == name and len(row) == 6)
        assert row[1:4] == [f"{matrix['update']:.1e}", f"{matrix['leak']:.2e}", f"{matrix['rounding']:.2e}"]
        assert any(name in title and f"{matrix['leak']:.2e}" in title for title in seen.titles)
    assert SCARY in seen.text
    assert ["--max-steps", "3"] in seen.rows
    assert "Size of the update: decoder.block" in seen.said
    assert ["block", "q", "k", "v", "o", "wi", "wo"] in seen.rows
    assert any(row[1:3] == ["SelfAttention.q", "SelfAttention.k"] and "EncDecAttention.q" in row for row in seen.rows)

    report, seen = run("verify", "--device", "cpu")
    assert "PASSED" in seen.said
    assert "bad" not in seen.classes
    for matrix in report["matrices"]:
        row = [matrix["name"], f"{matrix['update']:.1e}", f"{matrix['leak']:.2e}", f"{matrix['rounding']:.2e}"]
        assert any(found[:4] == row for found in seen.rows)

    report, seen = run("inspect", "--compare", "tuned/subspaces")
    for each in (*report["roles"], *report["blocks"]):
        assert any(
            row[:3] == [each["role"], str(each["num_matrices"]), percent(each["preserved"])] for row in seen.rows
        )
    for matrix in report["matrices"]:
        assert any(f"{matrix['name']}: {percent(matrix['preserved'])}" in title for title in seen.titles)
    assert "frozen" in seen.classes
    assert "curve" in seen.classes

    report, seen = run("evaluate", "--watch", made / SCARY, "--device", "cpu")
    assert f"{report['loss']:.4f}" in seen.said
    assert report["answers"][0]["prompt"] in seen.said
    assert [SCARY, f"{report['watched'][1]['loss']:.4f}"] in [row[:2] for row in seen.rows]


def test_places_that_cannot_be_are_refused_before_any_work(
    cli: Callable[..., Result], made: Path, tmp_path: Path
) -> None:
    taken, out = tmp_path / "taken.html", tmp_path / "out"
    taken.write_text("precious")
    train = ("train", made / "model", "--subspaces", made / "subspaces", "--data", "none.jsonl", "-o", out)
    verify = ("verify", made / "model", made / "model", "--subspaces", made / "subspaces")
    inspect, evaluate = ("inspect", made / "subspaces"), ("evaluate", made / "model", "--data", "none.jsonl")
    continual = ("continual", "none.toml", "-o", out)
    for command in (train, verify, inspect, evaluate, continual):
        for place, told in (
            (taken, "exists already, and was not written by sculptor; choose another --html"),
            (tmp_path / "page.png", "expected a name that ends in .html"),
            (tmp_path / "nowhere" / "page.html", "there is no folder"),
        ):
            found = cli(*command, "--html", place)
            assert told in found.err
            assert found.err.count("\n") == 1
            assert found.code == (2 if command is verify or "expected" in told else 1)
    for command in (train, continual):
        for place in (out, out.with_name("out.partial")):
            assert "choose a place beside it" in cli(*command, "--html", place / "page.html").err
    for command in (verify, evaluate):
        assert "--overwrite without effect" in cli(*command, "--overwrite").err
    assert "was not written by sculptor" in cli(*inspect, "--html", taken, "--overwrite").err
    assert taken.read_text() == "precious"
    assert [item.name for item in tmp_path.iterdir()] == ["taken.html"]
    ours = tmp_path / "ours.html"
    ours.write_text(page("inspect", "earlier"))
    assert "exists already; choose another --html or pass --overwrite" in cli(*inspect, "--html", ours).err
    assert cli(*inspect, "--html", ours, "--overwrite").code == 0
    assert "Protected" in looked_at(ours).text or "preserved" in looked_at(ours).text.lower()


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, small_disk: None) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_page(tmp_path / "page.html", "x" * 100_000, overwrite=False)
    assert not list(tmp_path.iterdir())


def test_a_failed_verification_says_so_and_no_name_is_markup(verification: Verification) -> None:
    text = verify_page(verification, "/home/me/base", "/home/me/tuned", "/home/me/subspaces")
    seen = Read(text)
    assert "FAILED" in seen.said
    assert text.count("<script") == 0
    assert seen.said.count(SHOWN) == 3  # changed, different, trained
    assert "/home" not in text
    assert "0.0123 ± 0.0004" in seen.said
    assert "0.2100 ± 0.0300" in seen.said
    assert "bad" in seen.classes
    assert any(row[0] == "0" and "✗" in row[1] for row in seen.rows)  # both experts in one cell
    assert ["1", "1.00"] in [row[:2] for row in seen.rows]
    assert any("12 matrices, from 1.00 to ∞" in title and "does NOT hold" in title for title in seen.titles)
    assert any("did not change" in title for title in seen.titles)
    for i in (3, 4):
        assert any(row[0] == verification.matrices[i].name and row[-1] == "NO" for row in seen.rows)
    passed = replace(
        verification, passed=True, matrices=verification.matrices[:1], untouched_identical=True, changed_elsewhere=(),
        differences=(), also_trained=(), doubt=None, kept=None,
    )  # fmt: skip
    assert "PASSED" in Read(verify_page(passed, "b", "t", "s")).said


@pytest.mark.parametrize(("num_tasks", "metric"), [(1, "loss"), (2, "accuracy"), (10, "exact_match")])
def test_sequences_of_tasks(num_tasks: int, metric: str) -> None:
    report = sequence(num_tasks, metric)
    text = continual_page(report)
    seen = Read(text)
    for stage, scores in zip(report.stages, report.matrix, strict=True):
        shown = [f"{-value:.3f}" if metric == "loss" else f"{100 * value:.1f}" for value in scores]
        assert any(row[1:] == shown and row[0][-3:] == stage.name[-3:] for row in seen.rows)
        assert any(stage.name in title for title in seen.titles)
        assert any(row[0] == stage.name and row[1] == f"{stage.watched[BAD]:.3f}" for row in seen.rows)
    assert seen.classes.count("own") == num_tasks
    assert "wiki.txt" in seen.text
    assert "/home" not in text
    assert ("BWT" in seen.said) == (num_tasks > 1)


def test_answers_and_watched_texts_are_shown_as_they_are() -> None:
    answer = Answer(f"/home/me/{BAD}:3", BAD, "", BAD, False)
    seen = Read(
        evaluate_page(replace(NOTHING, answers=(answer,), watched=(Watched(BAD, 1.0, 2.718, 9),)), "owner/model")
    )
    assert seen.said.count(SHOWN) >= 3
    assert "nothing" in seen.said
    assert "owner/model" in seen.said
    assert not Read(evaluate_page(NOTHING, "model")).rows


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [-2.0, 3.0], [5.0] * 3, [0.0, 1e-9, 7.0], [1.0 / (1 + i) for i in range(5000)]]
)
def test_curves_of_any_length_stay_inside(values: list[float], log: bool) -> None:
    text = chart("t", "e", [Curve("c", [(float(i), value) for i, value in enumerate(values)])], "step", str, log=log)
    seen = Read(text)
    for points in re.findall(r'points="([^"]+)"', text):
        corners = [tuple(map(float, pair.split(","))) for pair in points.split()]
        assert len(corners) <= 800
        assert all(-1 <= x <= 1001 and -1 <= y <= 1001 for x, y in corners)
    assert len(text) < 40_000
    assert ("band" in seen.classes) == (len(values) > 400)
    assert any(row == [f"{len(values) - 1:,}", str(values[-1])] for row in seen.rows) == (len(values) > 1)


def test_labels_of_an_axis_are_as_far_apart_as_they_say() -> None:
    said = Read(chart("t", "e", [Curve("c", [(0.0, 5.18), (1.0, 5.262)])], "stage", str)).said
    assert [text for text in said if text.startswith("5.2")] == ["5.2", "5.225", "5.25", "5.262"]


def test_staircases_cover_what_is_frozen() -> None:
    for steps, share in (((300, 500), (1000, 100)), 0.22), (((1000, 0),), 0.0), (((1000, 1000),), 1.0):
        (points,) = re.findall(r'points="([^"]+)"', staircase("t", "e", Staircase(1000, 1000, steps)))
        corners = [tuple(map(float, pair.split(","))) for pair in points.split()]
        area = sum(x * v - u * y for (x, y), (u, v) in pairwise([*corners, corners[0]])) / 2
        assert abs(area) / 1e6 == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_of_the_scale_can_be_read_on_and_steps_are_even(dark: bool) -> None:
    shades = style.scale(dark)

    def light(colour: str) -> float:
        full = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
        red, green, blue = (int(full[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return style.luminance((red, green, blue))

    for shade in shades:
        bright, faint = sorted((light(shade.back), light(shade.text)), reverse=True)
        assert (bright + 0.05) / (faint + 0.05) >= 4.5
    steps = [b - a for a, b in pairwise(light(shade.back) ** (1 / 3) for shade in shades)]
    assert all((step > 0) == dark for step in steps)
    assert max(map(abs, steps)) < 1.6 * min(map(abs, steps))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_nothing_is_wider_than_the_window(verification: Verification, tmp_path: Path) -> None:
    answer = Answer("rows.jsonl:1", "x" * 500, "y " * 300, BAD, False)
    pages = {
        "verify": verify_page(verification, "b" * 200, "tuned", "subspaces"),
        "continual": continual_page(sequence(10)),
        "evaluate": evaluate_page(replace(NOTHING, answers=(answer,), watched=(Watched("w" * 300, 1.0, 2.7, 9),)), "m" * 200),
    }  # fmt: skip
    with Browser() as browser:
        for name, text in pages.items():
            (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
            for width in (390, 1280):
                browser.open(tmp_path / f"{name}.html", width, "light")
                assert browser.said("document.querySelectorAll('tr').length") > 0
                assert browser.said("document.documentElement.scrollWidth") <= width
                assert browser.requested() == browser.complaints() == []


def test_a_page_without_sections_is_a_page() -> None:
    assert "nothing at all" in Read(page("verify", "nothing at all")).text
