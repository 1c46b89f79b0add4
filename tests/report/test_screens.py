"""Every page as a browser shows it: wide and narrow, light and dark, with long names, one task and ten.

What a program can see is checked: nothing is fetched, nothing is wider than its window, no text lies on another, and all can be
read on what is behind it. The pictures are for eyes: `pytest -m slow tests/report/test_screens.py --basetemp=pictures`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import transformers
from browser import CHROMIUM, Browser
from conftest import GROUPED, IDS, make_tokenizer, save_checkpoint, task_rows, write_rows
from edited import save_tuned

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")]

LONG = "customer-support-conversations-of-the-second-quarter-reviewed-and-deduplicated"
NAME = LONG[:40]  # a protected name may be no longer
PAGES = (
    "train", "verify-passed", "verify-failed", "inspect", "inspect-later", "evaluate", "card", "continual-one", "continual-ten",
    "frontier",
)  # fmt: skip
# Of every element with text of its own: the contrast with the nearest background behind it (WCAG 2 asks for 4.5).
PALE = """[...document.querySelectorAll('body *')].flatMap(e => {
  const text = [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.data.trim()).join('');
  if (!text || !e.getClientRects().length || e.closest('svg')) return [];
  const numbers = c => (c.match(/[\\d.]+/g) || []).map(Number);
  let behind = e, back = [];
  const seen = () => (back = numbers(getComputedStyle(behind).backgroundColor)).length < 4 || back[3] > 0;
  while (behind && !seen()) behind = behind.parentElement;
  if (!behind) back = [255, 255, 255];
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => c.slice(0, 3).reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const [a, b] = [light(numbers(getComputedStyle(e).color)), light(back)].sort((x, y) => y - x);
  const ratio = (a + .05) / (b + .05);
  return ratio < 4.5 ? [`${text.slice(0, 40)}: ${ratio.toFixed(2)}`] : [];
})"""
# Of every two lines of text that are near each other in a part of the page.
OVERLAPS = """[...document.querySelectorAll('section, header')].flatMap(part => {
  const texts = [...part.querySelectorAll('*')].flatMap(e => {
    if (e.closest('svg') || !e.getClientRects().length) return [];
    const around = e.closest('.scroll')?.getBoundingClientRect();
    return [...e.childNodes].filter(n => n.nodeType == 3 && n.data.trim()).flatMap(n => {
      const range = document.createRange();
      range.selectNodeContents(n);
      return [...range.getClientRects()].filter(r => !around || (r.right <= around.right + 1 && r.left >= around.left - 1))
        .map(r => [r, n.data.trim().slice(0, 30), e]);
    });
  });
  const found = [];
  for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length && j < i + 400; j++) {
    const [[r, a, e], [s, b, f]] = [texts[i], texts[j]];
    const wide = Math.min(r.right, s.right) - Math.max(r.left, s.left);
    const high = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
    const hidden = getComputedStyle(e).overflow == 'hidden' || getComputedStyle(f).overflow == 'hidden';
    if (e != f && wide > 2 && high > 4 && !hidden) found.push(`${a} | ${b}`);
  }
  return found;
})"""


def sculptor(*arguments: object, code: int = 0) -> None:
    """A command, in this process."""
    from sculptor_cli.main import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sculptor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run()
    assert (stopped.value.code or 0) == code


def save_deep(path: Path) -> None:
    """Twenty-four blocks, each very small."""
    config: dict[str, Any] = GROUPED | IDS | {"num_hidden_layers": 24}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def plan(path: Path, num_tasks: int) -> Path:
    """A plan of so many tasks with long names."""
    tasks = "".join(
        f'[[tasks]]\nname = "{LONG}-{i}"\ndata = ["task.jsonl"]\ntest = ["task.jsonl"]\n' for i in range(num_tasks)
    )
    file = path / f"plan-{num_tasks}.toml"
    file.write_text(
        f'model = "flat"\nwatch = ["{LONG}.jsonl", "text.jsonl"]\n[analyze]\nbasis = "curvature"\ndata = ["text.jsonl"]\n'
        f'calibration_tokens = 200\n[train]\nmax_steps = 2\nbatch_size = 4\ndevice = "cpu"\nlearning_rate = 1e-2\n'
        f"{tasks}",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One page of every kind, by the commands, of a model that knows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("pages")
        patch.chdir(place)
        save_deep(place / "model")
        save_checkpoint(place / "flat")
        tuned = save_tuned(place / "model", place / f"tuned-on-{LONG}")
        write_rows(place / "task.jsonl", task_rows(count=12))
        write_rows(place / f"{LONG}.jsonl", task_rows("text", 6))
        write_rows(place / "text.jsonl", task_rows("text", 12))
        cpu = ("--device", "cpu")
        moments = ("--basis", "curvature", "--data", "text.jsonl", "--calibration-tokens", 200)
        sculptor(
            "analyze", "model", *moments, "--protect", f"{NAME}={LONG}.jsonl", "--samples", "-o", "subspaces", *cpu
        )
        steps = (
            "--max-steps",
            20,
            "--batch-size",
            4,
            "--eval-data",
            "task.jsonl",
            "--eval-every",
            5,
            "--max-harm",
            0.5,
        )
        sculptor(
            "train",
            "model",
            "--subspaces",
            "subspaces",
            "--data",
            "task.jsonl",
            "-o",
            "taught",
            *steps,
            *cpu,
            "--html",
            "train.html",
        )
        sculptor(
            "verify", "model", "taught", "--subspaces", "subspaces", "--harm", *cpu, "--html", "verify-passed.html"
        )
        sculptor("verify", "model", tuned, "--subspaces", "subspaces", *cpu, "--html", "verify-failed.html", code=1)
        sculptor("inspect", "subspaces", "--html", "inspect.html")
        sculptor("inspect", "taught/subspaces", "--compare", "subspaces", "--html", "inspect-later.html")
        rows = ("--data", "task.jsonl", "--watch", f"{LONG}.jsonl")
        sculptor("evaluate", "taught", "--base", "model", *rows, "--show", 4, *cpu, "--html", "evaluate.html")
        gate = ("--subspaces", "subspaces", "--fail-if", f"{NAME}>-9", "--fail-if", "harm>9", "--fail-if", "unverified")
        sculptor("card", "model", "taught", tuned, *rows, *gate, *cpu, "--html", "card.html", code=1)
        for count, name in ((1, "one"), (10, "ten")):
            sculptor("continual", plan(place, count), "-o", name, "--html", f"continual-{name}.html")
        for method in ("full", "l2"):
            sculptor("continual", plan(place, 1), "-o", method, "--method", method)
        sculptor("frontier", "one", "full", "l2", "--html", "frontier.html")
        yield place


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def test_what_is_looked_for_is_seen(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<!doctype html><img src='file:///nowhere.png'><section><p style='color:#999'>pale words</p>"
        "<p style='position:absolute;top:60px'>one of two</p><p style='position:absolute;top:62px'>two of two</p>"
        "<div style='width:2000px'>wide</div></section>"
    )
    browser.open(tmp_path / "bad.html", 390, "light")
    assert browser.requested() == ["file:///nowhere.png"]
    assert [found[:10] for found in browser.said(PALE)] == ["pale words"]
    assert "one of two | two of two" in browser.said(OVERLAPS)
    assert browser.said("document.documentElement.scrollWidth") >= 2000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_fit_to_be_seen(
    pages: Path, browser: Browser, name: str, width: int, scheme: Literal["light", "dark"]
) -> None:
    browser.open(pages / f"{name}.html", width, scheme)
    browser.said("document.querySelectorAll('details').forEach(e => e.open = true)")
    browser.picture(pages / f"{name}-{width}-{scheme}.png")
    assert browser.requested() == []
    assert browser.complaints() == []
    assert browser.said("document.documentElement.scrollWidth") <= width
    assert browser.said(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
    assert browser.said(PALE) == []
    assert browser.said(OVERLAPS) == []
