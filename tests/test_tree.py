"""Tests mirror the tree: what tests a module stands where the module stands, or says so.

A module with more than a few lines of logic has a test file of its name in the folder of its name, or stands in the
`COVERS = ["sculptor.room.module"]` of the test file that runs it.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

import sculptor

TESTS = Path(__file__).resolve().parent
ROOMS = Path(sculptor.__file__).resolve().parent
# Lines of code, imports, docstrings and comments aside; what is shorter is data or a name for something.
FEW = 40


def lines_of(file: Path) -> int:
    """Lines of code."""
    text = file.read_text(encoding="utf-8")
    aside: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            aside |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        number not in aside and line.strip() != "" and not line.strip().startswith("#") for number, line in lines
    )


def module_of(file: Path) -> str:
    return ".".join(("sculptor", *file.relative_to(ROOMS).with_suffix("").parts))


def covered_by(file: Path) -> list[str]:
    """What a test file says that it covers."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "COVERS" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


MODULES = {module_of(file): file for file in sorted(ROOMS.rglob("*.py")) if file.name != "__init__.py"}
OWN = {
    module: test
    for module, file in MODULES.items()
    if (test := TESTS / file.relative_to(ROOMS).parent / f"test_{file.name}").is_file()
}
SAID = {file: covered_by(file) for file in sorted(TESTS.rglob("test_*.py"))}


@pytest.mark.parametrize("module", [name for name, file in MODULES.items() if lines_of(file) > FEW])
def test_a_module_has_its_tests(module: str) -> None:
    room = Path(*module.split(".")[1:])
    said = [file for file, modules in SAID.items() if module in modules]
    assert module in OWN or said, f"no tests/{room.parent}/test_{room.name}.py, and no COVERS has {module}"


def test_what_is_said_to_be_covered_is_there_and_nowhere_else() -> None:
    said = Counter(module for modules in SAID.values() for module in modules)
    assert said.keys() <= MODULES.keys(), "no such modules"
    assert not said.keys() & OWN.keys(), "have a test file of their own"
    assert max(said.values()) == 1, "each is one file's"
    assert all(lines_of(MODULES[module]) > FEW for module in said), "need none"
