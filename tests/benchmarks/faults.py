"""ENOSPC, EIO and SIGKILL at every file operation of small runs of all commands that write, which are then taken up.

    python tests/benchmarks/faults.py DIR [--model DIR] [--output FILE] [--deadline SECONDS] [--jobs N] [--fresh N]
        [--command NAME]... [--fault ENOSPC|EIO|SIGKILL|FULL]... [--every N] [--at N]... [--again]

Each point runs the real command line in a process of its own, forked from one that has imported everything. It has to end in one
line of ours, or be gone; what is then in its place has to be whole; and the same command with --resume (or --overwrite, or as it
was, where there is neither) has to leave what an undisturbed run leaves: every tensor, every byte of files that are the same in two
undisturbed runs, and nothing beside it. A few points of each command are tried in new processes, too, and have to end alike.

FULL is a disk that stays full: from the point on all that needs room fails.

Results are lines of FILE, and a second call tries what is not there yet. Ends with a table, and 1 unless every point is fine.
"""

import argparse
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fault_points import Command, Tried, Undisturbed, try_point, undisturbed
from fault_process import FAULTS, Fault, forked, fresh
from tqdm import tqdm

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.reader import open_checkpoint

PLAN = """model = {model}
[analyze]
preserve = 0.5
device = "cpu"
[train]
max_steps = 2
save_every = 1
batch_size = 6
device = "cpu"
[[tasks]]
name = "one"
data = ["rows.jsonl"]
test = ["rows.jsonl"]
[[tasks]]
name = "two"
data = ["rows.jsonl"]
test = ["rows.jsonl"]
"""
_ROWS = "{root}/rows.jsonl"
_MIX = f"--data {_ROWS}:0.6 --data {{root}}/more.jsonl:0.4 --max-steps 2 --save-every 1 --batch-size 6 --device cpu"
_TRAIN = f"--data {_ROWS} --eval-data {_ROWS} --max-steps 3 --save-every 1 --eval-every 1 --batch-size 6 --device cpu"
_PAGE, _PICTURE = "--html {work}/page.html", "--plot {work}/picture.png"
_ADD = f"bank add {{work}}/out {{model}} {{root}}/tuned --data {_ROWS} --device cpu --name"
COMMANDS = {
    "prune": Command("edit prune {model} --sparsity 0.3 --by magnitude -o {work}/out", "--overwrite"),
    "edit": Command("edit interpolate {model} {root}/tuned --alpha 0.5 --device cpu -o {work}/out", "--overwrite"),
    "convert": Command("convert {root}/archive --model {model} -o {work}/out", "--overwrite"),
    "bank": Command(f"{_ADD} one", ""),
    "bank-more": Command(f"{_ADD} two", "", f"{_ADD} one"),
    "bank-export": Command("bank export {root}/bank {model} --task one -o {work}/out", "--overwrite"),
    "inspect": Command(f"inspect {{root}}/archive {_PICTURE} {_PAGE}", "--overwrite"),
    "verify": Command(
        f"verify {{model}} {{root}}/tuned --subspaces {{root}}/archive --device cpu {_PAGE}", "--overwrite"
    ),
    "evaluate": Command(f"evaluate {{model}} --data {_ROWS} --device cpu {_PAGE}", "--overwrite"),
    "card": Command(
        f"card {{model}} {{root}}/tuned --data {_ROWS} --device cpu --json {{work}}/card.json {_PAGE}", "--overwrite"
    ),
    "frontier": Command(f"frontier {{root}}/run {{root}}/plain {_PICTURE} {_PAGE}", "--overwrite"),
    "analyze": Command("analyze {model} --preserve 0.5 --device cpu -o {work}/out"),
    "analyze-curvature": Command(f"analyze {{model}} --basis curvature --data {_ROWS} --device cpu -o {{work}}/out"),
    "train": Command(f"train {{model}} --subspaces {{root}}/archive {_TRAIN} -o {{work}}/out"),
    "train-page": Command(f"train {{model}} --subspaces {{root}}/archive {_MIX} {_PAGE} -o {{work}}/out"),
    "train-disk": Command(f"train {{model}} --subspaces {{root}}/archive {_TRAIN} --offload disk -o {{work}}/out"),
    "train-tokens": Command(
        "train {model} --subspaces {root}/sampled --data {root}/new.jsonl:0.6 --data {root}/more.jsonl:0.4 --replay self:0.2 "
        "--add-tokens <new> --harm-every 1 --max-steps 2 --save-every 1 --batch-size 6 --device cpu -o {work}/out"
    ),
    "train-first": Command(f"train {{model}} --protect-data {_ROWS} {_MIX} -o {{work}}/out"),
    "continual": Command("continual {root}/plan.toml -o {work}/out"),
    "continual-page": Command(f"continual {{root}}/plan.toml --method full {_PICTURE} {_PAGE} -o {{work}}/out"),
}
_SHOWN = 0.5 if sys.stderr.isatty() else 20  # seconds between two lines of progress
# What they read, each from those before it.
INPUTS = {
    "archive": "analyze {model} --preserve 0.5 --no-samples --device cpu -o {root}/archive",
    "sampled": "analyze {model} --preserve 0.5 --samples --device cpu -o {root}/sampled",
    "tuned": f"train {{model}} --subspaces {{root}}/archive --data {_ROWS} --max-steps 1 --device cpu -o {{root}}/tuned",
    "bank": f"bank add {{root}}/bank {{model}} {{root}}/tuned --data {_ROWS} --device cpu --name one",
    "run": "continual {root}/plan.toml -o {root}/run",
    "plain": "continual {root}/plan.toml --method full -o {root}/plain",
}


class Point(NamedTuple):
    """One of those that are tried; in a new process, or in a fork."""

    command: str
    kind: str
    at: int
    new: bool


def prepare(root: Path, model: Path | None, chosen: Iterable[str]) -> dict[str, Path]:
    """What the chosen commands read; returns where things are."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "inputs").mkdir(parents=True)
    if model is None:
        from conftest import save_checkpoint

        model = save_checkpoint(root / "model", max_shard_size="40KB")
    for name, last in (("rows", "w0"), ("more", "w0"), ("new", "<new>")):
        rows = [{"prompt": f"w{2 * i} w{6 * i % 7} {last}", "completion": f"w{i % 4}"} for i in range(6)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "plan.toml").write_text(PLAN.format(model=json.dumps(str(model.resolve()))))
    places = {"root": root, "model": model.resolve()}
    lines = " ".join(COMMANDS[name].line for name in chosen)
    needed = []
    for name, line in reversed(INPUTS.items()):
        if f"{{root}}/{name} " in lines + " ":
            lines += " " + line
            needed.append(line)
    for line in reversed(needed):
        ended = forked(Command(line).arguments(places), root / "inputs", root / "log")
        assert ended.code == 0, ended.said
    return places


def one_point(
    places: dict[str, Path], expected: Mapping[str, Undisturbed], deadline: float, point: Point
) -> tuple[str | None, float] | None:
    """What is wrong with a point, if anything, and its seconds; None after the deadline."""
    if time.time() > deadline:
        return None
    began, fault = time.perf_counter(), Fault(point.at, point.kind)
    ask = functools.partial(try_point, COMMANDS[point.command], places, expected[point.command], fault)
    try:
        found = ask()
        if point.new and found.wrong is None:
            other = ask(fresh)
            found = Tried(other.wrong or difference(found, other), other.ended, other.left)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - began
    return found.wrong, time.perf_counter() - began


def _without_process(name: str) -> str:
    """What a killed process has left of a page carries its number."""
    return re.sub(r"\.\d+\.tmp$", ".tmp", name)


def difference(first: Tried, second: Tried) -> str | None:
    """How a new process ended otherwise than a fork: in another way, or with other tensors or files."""
    if first.ended != second.ended:
        return f"a fork ended with {first.ended}, a new process with {second.ended}"
    one, other = ({_without_process(name): value for name, value in tried.left.items()} for tried in (first, second))
    names = {name for name in {*one, *other} if ":" in name or not {name} <= {*one} & {*other}}
    names = {name for name in names if one.get(name) != other.get(name)}
    return f"a fork and a new process left {len(names)} differing, first {min(names)}" if names else None


def points_of(name: str, count: int, options: argparse.Namespace) -> Iterator[Point]:
    """Those that are asked for: every one in a fork, and some in a new process."""
    chosen = options.at or range(1, count + 1, options.every)
    apart = {max(1, round(count * (i + 1) / (options.fresh + 1))) for i in range(options.fresh)}
    for kind in options.fault or FAULTS[:3]:
        yield from (Point(name, kind, at, False) for at in chosen)
        yield from (Point(name, kind, at, True) for at in sorted(apart))


def read_results(file: Path | None) -> dict[tuple[Point, int], str | None]:
    """What earlier calls found, by point and how many there were then; the last word counts."""
    found: dict[tuple[Point, int], str | None] = {}
    if file is not None and file.exists():
        for line in file.read_text().splitlines():
            with suppress(ValueError):  # half a line of a call that was killed
                row = json.loads(line)
                found[Point(row["command"], row["fault"], row["at"], row["new"]), row["points"]] = row["wrong"]
    return found


def table(points: Sequence[tuple[Point, int]], found: Mapping[tuple[Point, int], str | None]) -> None:
    """One line for each command and fault, and the first few failures of each."""
    print(f"\n{'command':<18} {'fault':<8} {'points':>7} {'ok':>6} {'failed':>7} {'not tried':>10} {'new process':>12}")
    failures = defaultdict(list)
    groups: dict[tuple[str, str], list[tuple[Point, int]]] = defaultdict(list)
    for key in points:
        groups[key[0].command, key[0].kind].append(key)
    for (name, kind), keys in groups.items():
        forks = [key for key in keys if not key[0].new]
        ok, missing = sum(found.get(key, "") is None for key in forks), sum(key not in found for key in forks)
        new = sum(found.get(key, "") is None for key in keys if key[0].new)
        counts = f"{len(forks):>7} {ok:>6} {len(forks) - ok - missing:>7} {missing:>10}"
        print(f"{name:<18} {kind:<8} {counts} {f'{new} of {len(keys) - len(forks)}':>12}")
        failures[name, kind] = [key for key in keys if found.get(key) is not None]
    for (name, kind), keys in failures.items():
        for (point, _), wrong in [(key, found[key]) for key in keys[:3]]:
            print(
                f"{name} {kind} at {point.at}{' (new process)' if point.new else ''}: {' '.join(str(wrong).split())[:400]}"
            )
        if len(keys) > 3:
            print(f"{name} {kind}: {len(keys) - 3} more, at {', '.join(str(point.at) for point, _ in keys[3:])}")


def main() -> None:
    """Every command, fault and point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where all of it happens; it is emptied")
    parser.add_argument("--model", type=Path, help="a small checkpoint [default: a random one, which takes pytest]")
    parser.add_argument("--output", type=Path, help="results, a line of JSON each, which a second call goes on from")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no point is begun")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="points at a time [default: cores]"
    )
    parser.add_argument(
        "--fresh", type=int, default=1, help="points of each command and fault also tried in new processes"
    )
    parser.add_argument("--command", action="append", choices=COMMANDS, help="repeatable [default: all]")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="repeatable [default: all but FULL]")
    parser.add_argument("--every", type=int, default=1, help="only every so many points")
    parser.add_argument("--at", type=int, action="append", help="only this point; repeatable")
    parser.add_argument("--again", action="store_true", help="try once more what failed in an earlier call")
    options = parser.parse_args()
    deadline = time.time() + options.deadline
    chosen = [name for name in COMMANDS if name in (options.command or COMMANDS)]
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: pictures are left out", file=sys.stderr)
        for name, command in COMMANDS.items():
            COMMANDS[name] = Command(command.line.replace(_PICTURE, ""), command.again, command.before)
    places = prepare(options.directory.resolve(), options.model, chosen)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, context) as pool:
        runs = pool.map(undisturbed, [COMMANDS[name] for name in chosen], [places] * len(chosen))
        bar = tqdm(runs, desc="undisturbed", total=len(chosen), unit="command", mininterval=_SHOWN)
        expected = dict(zip(chosen, bar, strict=True))
    for module in sorted({each for run in expected.values() for each in run.modules} - {*sys.modules}):
        with suppress(Exception):  # one that is no module by itself
            importlib.import_module(module)
    inspect_architecture(
        open_checkpoint(places["model"])
    )  # kept by what it depends on; takes longer than most commands
    points = [
        (point, expected[name].points) for name in chosen for point in points_of(name, expected[name].points, options)
    ]
    found = read_results(options.output)
    todo = [key for key in points if key not in found or (options.again and found[key] is not None)]
    try_all(todo, found, functools.partial(one_point, places, expected, deadline), options)
    table(points, found)
    sys.exit(0 if all(found.get(key, "") is None for key in points) else 1)


def try_all(
    todo: Sequence[tuple[Point, int]], found: dict[tuple[Point, int], str | None], ask: Any, options: argparse.Namespace
) -> None:
    """Tries points side by side, and notes what came of each."""
    with (
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool,
        open(options.output or os.devnull, "a") as file,
        tqdm(total=len(todo), desc="points", unit="point", smoothing=0.02, mininterval=_SHOWN) as bar,
    ):
        asked = {pool.submit(ask, key[0]): key for key in todo}
        failed = 0
        for future in as_completed(asked):
            point, count = asked[future]
            if (result := future.result()) is None:
                continue
            found[point, count], seconds = result
            failed += result[0] is not None
            row = {"command": point.command, "fault": point.kind, "at": point.at, "new": point.new, "points": count}
            file.write(json.dumps(row | {"wrong": result[0], "seconds": round(seconds, 2)}) + "\n")
            file.flush()
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(1)


if __name__ == "__main__":
    main()
