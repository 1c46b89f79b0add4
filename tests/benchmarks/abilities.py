"""What tuned models can still do, row by row and in pairs with their base: cloze suites, the loss of LAMBADA, and IFEval.

    python tests/benchmarks/abilities.py read MODEL DATA FILE [--choices-only]
    python tests/benchmarks/abilities.py compare BASE FILE... [--ifeval DATA]

`read` asks a model all rows of DATA/abilities/{piqa,arc_easy,hellaswag,lambada}.jsonl and, unless told otherwise, the prompts of
ifeval.jsonl, and keeps in FILE which rows were right and what was said. `compare` prints how FILEs differ from BASE; several
FILEs called alike up to their last dash are seeds of one thing, and become a mean. With --ifeval, lm-eval's checker judges what
was said (extra `harness`).
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.files import read_file_rows
from sculptor.data.rows import Row
from sculptor.errors import DataError
from sculptor.evaluation.answers import say
from sculptor.evaluation.ifeval import Check, find_checker
from sculptor.evaluation.rows import read_evaluation_rows
from sculptor.evaluation.series import Figure, Reading, Series, change, followed_series, read_series
from sculptor.jobs.card_report import SHARES
from sculptor.jobs.job import open_model
from sculptor.model.load import LoadedModel, resolve_device
from sculptor.numerics.ratio import ratio_of_sums
from sculptor.progress import silent

SUITES: dict[str, Figure] = {"piqa": "accuracy", "arc_easy": "accuracy", "hellaswag": "acc_norm", "lambada": "loss"}
LENGTH, ANSWER, BATCH = 1024, 768, 128
ASKED = 256  # prompts at once: every token of an answer is a pass of its own


def read(model: Path, data: Path, file: Path, *, answers: bool = True) -> None:
    """Asks a model everything; without `answers` what it is to choose alone."""
    checkpoint = open_checkpoint(model)
    loaded = open_model(
        checkpoint, resolve_device("auto"), inspect_architecture(checkpoint), "auto", tokens=BATCH * LENGTH
    )
    found: dict[str, Any] = {}
    with closing(loaded):
        for suite, figure in SUITES.items():
            rows = read_evaluation_rows([str(data / "abilities" / f"{suite}.jsonl")], None, None, None)
            found[suite] = _series(loaded, rows, figure)
        if answers:
            prompts = [str(row["prompt"]) for row in _instructions(data)]
            found["ifeval"] = say(
                loaded, prompts, LENGTH, ANSWER, ASKED, silent(total=len(prompts), desc="answer", unit="row")
            )
    file.write_text(json.dumps(found), encoding="utf-8")


def _series(loaded: LoadedModel, rows: Sequence[Row], figure: str) -> dict[str, Any]:
    for series in read_series(loaded, rows, Reading(LENGTH, BATCH, None, False), silent):
        if series.figure == figure:
            return {"sums": series.sums, "counts": series.counts}
    raise ValueError(f"no {figure}")


def mean(found: dict[str, Any]) -> float:
    """Of a suite that was read."""
    return sum(found["sums"]) / sum(found["counts"])


def _instructions(data: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_file_rows(data / "abilities" / "ifeval.jsonl") if isinstance(row, dict)]


def compare(base: Path, files: Sequence[Path], data: Path | None) -> None:
    """One line per thing and figure: the base, the mean, and the change with its 95 % interval over rows."""
    before = _judged(base, data)
    groups: dict[str, list[dict[str, Series]]] = defaultdict(list)
    for file in files:
        groups[file.stem.rpartition("-")[0] or file.stem].append(_judged(file, data))
    for name, group in groups.items():
        for figure, old in before.items():
            if any(figure not in each for each in group):
                continue
            moved = [change(old, each[figure]) for each in group]
            # Over seeds a row's outcome is its mean: what is left is how rows differ.
            rows = zip(*(each[figure].sums for each in group), strict=True)
            differences = [sum(row) / len(row) - was for row, was in zip(rows, old.sums, strict=True)]
            found = ratio_of_sums(differences, old.counts)
            scale = 100 if old.figure in SHARES else 1
            each_seed = " ".join(f"{scale * one.mean:+.2f}" for one in moved)
            print(
                f"{name:30} {figure:12} {scale * old.mean.mean:6.2f} {scale * (old.mean.mean + found.mean):6.2f} "
                f"{scale * found.mean:+.2f} ({scale * found.low:+.2f} to {scale * found.high:+.2f})  {each_seed}"
            )


def _judged(file: Path, data: Path | None) -> dict[str, Series]:
    found = json.loads(file.read_text(encoding="utf-8"))
    series = {
        name: Series(figure, tuple(found[name]["sums"]), tuple(found[name]["counts"]))
        for name, figure in SUITES.items()
    }
    if data is not None and "ifeval" in found:
        check = find_checker()
        assert check is not None
        pairs = [pair for pair in zip(_instructions(data), found["ifeval"], strict=True) if _is_judged(check, pair[0])]
        rows, said = zip(*pairs, strict=True)
        series |= {each.figure: each for each in followed_series(rows, said, check)}
        print(f"{file.stem}: {len(pairs)} of {len(found['ifeval'])} prompts of IFEval are judged")
    return series


def _is_judged(check: Check, row: dict[str, Any]) -> bool:
    """Some instructions are judged by data of nltk, which not every machine has."""
    try:
        check(row, "An answer. Of two sentences.")
    except DataError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("read")
    for name in ("model", "data", "file"):
        asked.add_argument(name, type=Path)
    asked.add_argument("--choices-only", action="store_true")
    compared = commands.add_parser("compare")
    compared.add_argument("base", type=Path)
    compared.add_argument("files", type=Path, nargs="+")
    compared.add_argument("--ifeval", type=Path, metavar="DATA")
    arguments = parser.parse_args()
    if arguments.command == "read":
        read(arguments.model, arguments.data, arguments.file, answers=not arguments.choices_only)
        found = json.loads(arguments.file.read_text(encoding="utf-8"))
        print(" ".join(f"{suite} {mean(found[suite]):.4f}" for suite in SUITES))
    else:
        compare(arguments.base, arguments.files, arguments.ifeval)


if __name__ == "__main__":
    main()
