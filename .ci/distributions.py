"""Checks that an sdist and a wheel hold the program, whole, and nothing else: `python .ci/distributions.py FOLDER`.

What belongs there is told by the tree that this file lies in.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md", "pyproject.toml")
OF_SETUPTOOLS = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
OF_WHEELS = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")


def program() -> set[str]:
    """Files of the packages, as they lie in the tree."""
    code = {file for folder in ("sculptor", "cli") for file in (ROOT / folder).rglob("*.py")}
    return {file.relative_to(ROOT).as_posix() for file in code} | {"sculptor/py.typed"}


def wanted_of_sdist() -> set[str]:
    """Names in an sdist, below its own folder."""
    docs = {file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")}
    egg = {f"sculptor_subspaces.egg-info/{name}" for name in OF_SETUPTOOLS}
    return {*program(), *docs, *PAGES, *egg, "PKG-INFO", "setup.cfg"}


def wanted_of_wheel(information: str) -> set[str]:
    """Names in a wheel whose metadata are in the folder `information`."""
    code = {f"sculptor_{name}" if name.startswith("cli/") else name for name in program()}
    return code | {f"{information}/{name}" for name in OF_WHEELS}


def faults(found: set[str], wanted: set[str]) -> list[str]:
    """What is too much, and what is missing."""
    return [f"holds {name}" for name in sorted(found - wanted)] + [f"lacks {name}" for name in sorted(wanted - found)]


def check(folder: Path) -> list[str]:
    """Faults of the one sdist and the one wheel in a folder."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as packed:
        below = {member.name.partition("/")[2] for member in packed.getmembers() if not member.isdir()}
    with zipfile.ZipFile(wheel) as zipped:
        names = set(zipped.namelist())
    information = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    found = {sdist.name: faults(below, wanted_of_sdist()), wheel.name: faults(names, wanted_of_wheel(information))}
    return [f"{name} {fault}" for name, each in found.items() for fault in each]


if __name__ == "__main__":
    sys.exit("\n".join(check(Path(sys.argv[1]))) or None)
