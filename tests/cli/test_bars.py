"""Progress bars: on a terminal one line that changes, in a log file lines."""

import ast
import io
import sys
from pathlib import Path

import pytest
from sculptor_cli import options

from sculptor import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0)
    bar = options.bars(total=3, desc="train", unit="step")
    bar.set_postfix_str("loss 1.5", refresh=False)
    for _ in range(3):
        bar.update(1)
        bar.refresh()
    bar.close()
    return stream.getvalue()


def test_a_log_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO())
    assert "\r" not in text
    assert text.endswith("\n")
    lines = text.splitlines()
    assert all(line.startswith("train:") for line in lines), lines
    assert "loss 1.5" in lines[-1]
    assert any("2/3" in line for line in lines)


def test_of_several_processes_the_first_alone_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0)
    bar = options.bars(total=3, desc="train", unit="step")
    bar.update(3)
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, _Terminal())
    assert "\r" in text
    assert "\n" not in text


def makes_bar(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(word.arg == "desc" for word in node.keywords)


def test_a_bar_is_closed_where_the_work_fails() -> None:
    """One that stays open moves every later one down a line, as long as somebody keeps the error."""
    package = Path(progress.__file__).parent
    made = closed = 0
    for file in set(package.rglob("*.py")) - {Path(progress.__file__)}:
        for node in ast.walk(ast.parse(file.read_text())):
            made += makes_bar(node)
            if isinstance(node, ast.With):
                items = [item.context_expr for item in node.items]
                closed += sum(
                    ast.unparse(item).startswith("closing(") and any(map(makes_bar, ast.walk(item))) for item in items
                )
    assert made == closed > 30
