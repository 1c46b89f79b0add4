"""The pictures of the documentation that no command draws: `python tests/benchmarks/pictures.py ARCHIVE MATRIX PICTURE`.

The frozen pairs of one matrix of a real archive, with words for its parts. docs/words.md says which archive and matrix.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from sculptor import Archive
from sculptor.methods.staircase import StaircaseRule


def draw(archive: Path, matrix: str, picture: Path) -> None:
    """A row per output direction, a column per input direction, both in order of importance."""
    rule = Archive(archive)[matrix].rule
    assert isinstance(rule, StaircaseRule)
    rows, columns = rule.shape
    free = rule.staircase.num_free / (rows * columns)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#eef4ea")
    start = 0
    for stop, reach in rule.staircase.steps:
        axes.fill([0, reach, reach, 0], [start, start, stop, stop], color="#1d5fae", linewidth=0)
        start = stop
    reach, stop = rule.staircase.steps[0][1], rule.staircase.steps[0][0]
    axes.text(
        reach * 0.04, stop * 0.5, f"frozen pairs, {1 - free:.0%}:\nno training moves them", color="white", va="center"
    )
    axes.text(columns * 0.97, rows * 0.9, f"free pairs, {free:.0%}:\none trained number each", ha="right", va="center")
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_xlabel("input directions: what the matrix reads, most important first")
    axes.set_ylabel("output directions: what it writes,\nmost important first")
    axes.set_title(f"{matrix}, {rows} x {columns}", fontsize=10)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
