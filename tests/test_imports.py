"""Imports point downwards only; nothing heavy happens before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each floor may import itself and those before it; rooms of one floor do not import each other.
FLOORS = [
    {"numerics", "distribution", "errors", "interruption", "peers", "progress", "validation", "world"},
    {"checkpoint", "methods"},
    {"archive", "data", "streaming"},
    {"model", "edits"},
    {"analysis", "training", "evaluation"},
    {"planning"},
    {"jobs"},
    {"tasks"},
    {"benchmark", "axolotl", "swift"},
    {"report"},
    {"sculptor_cli"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(file: Path) -> list[str]:
    """Rooms of sculptor that a file imports."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level or "cli" in file.parts, f"{file}: relative import"
            names = [node.module or ""]
            if node.module == "sculptor":
                names = [f"sculptor.{alias.name}" for alias in node.names if alias.name in LEVEL]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sculptor" and len(parts) > 1:
                found.append(parts[1])
            if parts[0] == "sculptor_cli":
                found.append("sculptor_cli")
    return found


FILES = [file for folder in ("sculptor", "cli") for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_imports_point_downwards(file: Path) -> None:
    parts = file.relative_to(ROOT).parts
    if parts == ("sculptor", "__init__.py"):
        return  # names the public API, lazily
    room = "sculptor_cli" if parts[0] == "cli" else parts[1].removesuffix(".py")
    for other in imports_of(file):
        assert other == room or LEVEL[other] < LEVEL[room] or {other, room} <= FLOORS[0], f"{room} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_modules_are_short_and_say_what_they_are(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text)), "no module docstring"


def test_importing_sculptor_imports_nothing_heavy() -> None:
    code = "import sys, sculptor; assert not {'torch', 'transformers'} & set(sys.modules); assert sculptor.protect"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_api_is_complete() -> None:
    import sculptor

    for name in sculptor.__all__:
        found = getattr(sculptor, name)
        assert isinstance(found, str) or found.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sculptor.nothing
