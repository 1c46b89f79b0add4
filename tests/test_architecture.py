"""The calls of a streamed step that docs/architecture.md shows are made, and counted right."""

import ast
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from conftest import save_checkpoint, task_rows, write_rows

import sculptor
from sculptor import AnalyzeSettings, TrainSettings, analyze, train
from sculptor.training.loop import TrainingLoop

ROOMS = Path(sculptor.__file__).resolve().parent
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")

# A file of sculptor, and one of its functions.
Place = tuple[str, str]


@functools.cache
def place_of(code: CodeType) -> Place | None:
    """Where code is; of a lambda, the function that made it."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOMS):
        return None
    names = [name for name in code.co_qualname.split(".") if not name.startswith("<")]
    return path.relative_to(ROOMS).as_posix(), names[-1]


def hops_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> set[tuple[str, Place]]:
    """The file that calls, and what it calls in another one, of the steps of a run."""
    found: set[tuple[str, Place]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (callee := place_of(frame.f_code)) is None:
            return
        above = frame.f_back
        while above is not None and (caller := place_of(above.f_code)) is None:
            above = above.f_back
        if above is not None and caller is not None and caller[0] != callee[0]:
            found.add((caller[0], callee))

    step = TrainingLoop._step

    def watched(*arguments: Any) -> None:
        sys.setprofile(note)
        try:
            step(*arguments)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(TrainingLoop, "_step", watched)
    run()
    return found


def shown() -> list[tuple[int, str, str]]:
    """Depth, file and function of each line of the page's tree."""
    (tree,) = re.findall(r"^```text\n(training/loop\.py .*?)^```", PAGE, re.M | re.S)
    lines = []
    for line in tree.splitlines():
        indent, file, name = re.fullmatch(r"( *)(\S+) (\w+)(?: .*)?", line).groups()  # type: ignore[union-attr]
        lines.append((len(indent) // 4, re.sub("^stepping/", "training/stepping/", file), name))
    return lines


@functools.cache
def imports_of(file: str) -> frozenset[str]:
    """The files of sculptor that a file imports."""
    modules = [
        node.module or ""
        for node in ast.walk(ast.parse((ROOMS / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]
    paths = ["/".join(module.split(".")[1:]) + ".py" for module in modules if module.startswith("sculptor.")]
    return frozenset(path for path in paths if (ROOMS / path).is_file())


def imported_by(file: str) -> set[str]:
    """The same, and what these import."""
    found: set[str] = set()
    todo = [file]
    while todo:
        new = imports_of(todo.pop()) - found
        found |= new
        todo += new
    return found


def goes_up(caller: str, called: str) -> bool:
    """Whether a call goes to a higher floor, or to a file that stands on the caller's: against the imports either way."""
    floors = {
        room: int(floor)
        for floor, rooms in re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.M)
        for room in re.findall(r"\w+", rooms)
    }
    below, above = floors[caller.split("/")[0]], floors[called.split("/")[0]]
    return above > below or caller in imported_by(called)


def test_the_calls_of_a_streamed_step_are_those_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = save_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", task_rows())
    archive, tuned = tmp_path / "archive", tmp_path / "tuned"
    analyze(model, archive, AnalyzeSettings(preserve=0.5, samples=False, device="cpu"))
    settings = TrainSettings(max_steps=2, save_every=2, batch_size=2, micro_batch_size=1, offload="cpu", device="cpu")
    hops = hops_of(monkeypatch, lambda: train(model, archive, [rows], tuned, settings))

    lines = shown()
    above: dict[int, str] = {}
    upwards = 0
    for depth, file, name in lines:
        if depth:
            assert (above[depth - 1], (file, name)) in hops, f"{above[depth - 1]} calls no {name} of {file}"
            upwards += goes_up(above[depth - 1], file)
        above[depth] = file
    depths = [depth for depth, _, _ in lines]
    assert f"Every line but the first is one: {len(lines) - 1}, the deepest {max(depths)} below the loop." in PAGE
    assert f"{upwards} of the hops go upwards" in PAGE
