"""What is installed is what is there."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import sculptor
from sculptor.distribution import NAME, extra

ROOT = Path(__file__).resolve().parents[1]


def test_packages_are_the_folders_on_disk() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for folder in ("sculptor", "cli")
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == {"sculptor_cli" if name == "cli" else name for name in folders}


def test_no_top_level_cli_is_installed() -> None:
    from importlib.metadata import packages_distributions

    assert "sculptor" not in packages_distributions().get("cli", [])
    assert importlib.util.find_spec("sculptor_cli") is not None


def test_tests_mirror_the_tree() -> None:
    rooms = {path.name for path in (ROOT / "sculptor").iterdir() if (path / "__init__.py").is_file()} | {"cli"}
    beside = {"benchmarks", "fuzz"}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"} == rooms | beside


def _pages() -> list[Path]:
    listed = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "pyproject.toml"]
    return [*listed, *(ROOT / "docs").glob("*.md"), *(ROOT / "sculptor").rglob("*.py"), *(ROOT / "cli").glob("*.py")]


def test_nothing_says_to_install_the_other_project() -> None:
    """`sculptor` on the package index is somebody else's."""
    wrong = re.compile(r"(?<!un)install\s+(-\S+\s+)*['\"]?sculptor(?!-subspaces|\s*\{)")
    assert wrong.search("pip install -U 'sculptor[data]'")
    assert [page.name for page in _pages() if wrong.search(page.read_text(encoding="utf-8"))] == []


def test_errors_name_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == NAME == sculptor.__distribution__
    named = {
        match
        for file in (ROOT / "sculptor").rglob("*.py")
        for match in re.findall(r"\{extra\('(\w+)'\)\}", file.read_text())
    }
    assert named == {"data", "harness", "plot", "baselines"}
    assert named <= project["optional-dependencies"].keys()
    assert extra("data") == "pip install 'sculptor-subspaces[data]', or in a checkout pip install -e '.[data]'"


def _distributions() -> Any:
    spec = importlib.util.spec_from_file_location("distributions", ROOT / ".ci" / "distributions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sdist_and_wheel_hold_the_program_and_nothing_else(tmp_path: Path) -> None:
    """Built in a copy that has what lies about in a folder somebody works in."""
    pytest.importorskip("setuptools", minversion="77")
    ignored = shutil.ignore_patterns("*.egg-info", ".git", ".*_cache", "__pycache__", "build", "dist", ".venv")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    for strewn in (
        "sculptor/__pycache__/errors.cpython-311.pyc",
        "sculptor/notes.txt",
        "tests/big.safetensors",
        "out/x.py",
    ):
        (tree / strewn).parent.mkdir(exist_ok=True)
        (tree / strewn).write_text("")
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    module = _distributions()
    assert module.check(tree / "dist") == []
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel, "a") as zipped:
        zipped.writestr("tests/rows.jsonl", "")
    assert module.check(tree / "dist") == [f"{wheel.name} holds tests/rows.jsonl"]
    assert module.faults({"a"}, {"a", "b"}) == ["lacks b"]


def test_the_citation_is_of_this_version() -> None:
    import yaml

    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (found["cff-version"], found["version"], found["license"]) == ("1.2.0", sculptor.__version__, "Apache-2.0")
    (paper,) = found["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2504.07097"
    assert all(author["family-names"] and author["given-names"] for author in paper["authors"])
