"""What is installed is what is there."""

import importlib.util
import tomllib
from pathlib import Path

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
