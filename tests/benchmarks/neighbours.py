"""The neighbours beside each other: every published system in one harness, at one budget, with a rate chosen as all others' are.

    python tests/benchmarks/neighbours.py all --model DIR --data DIR --output DIR [--jobs 8] [--deadline 540]
    python tests/benchmarks/neighbours.py table OUTPUT/results.jsonl

Each method learns four tasks at three rates, 0.3, 1 and 3 times its own default, in order 1 and judged by validation rows; at the
best of the three it is run in both orders and judged by test rows, and the best two of the neighbours with two seeds more. DATA is
that of frontier.py, whose `prepare` goes before.
"""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from continual import Content, Run, run_suites
from frontier import plan_text

from sculptor.benchmark.plan import AdapterSettings
from sculptor.methods import lowrank, mask, moments, rotation, weights

ROWS, BATCH = 1000, 16  # of each task, once
MULTIPLES = (1.0, 0.3, 3.0)
NEIGHBOURS = ("lines", "inflora", "sara", "orthsr", "bayes-adam", "esacl", "slm", "mamf", "olora")
BESIDE = ("sculptor", "crispedit", "replay", "full", "joint")
OLORA = 1e-3  # PEFT's know no default that follows from the model
_TOLD = AdapterSettings()
_FREE = 0.6  # of an archive of moments, the default


def default_rate(method: str, model: Path) -> tuple[str, float]:
    """The name and value of a setting that is about the default rate of a method (`sculptor/training/rates.py`)."""
    if method == "olora":
        return "learning_rate", OLORA
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    width, size = shape["hidden_size"], width_and_depth(shape)
    if method == "orthsr":
        return "relative_rate", rotation.RATE / (2 * (_TOLD.block_size - 1) ** 0.5) / size**0.5
    rate, free = {
        "sculptor": (moments.RATE, _FREE),
        "crispedit": (moments.RATE, _FREE),
        "inflora": (lowrank.RATE, _TOLD.rank / width),
        "slm": (lowrank.RATE, _TOLD.rank / width),
        "sara": (mask.RATE, _TOLD.free),
        "esacl": (mask.RATE, _TOLD.sparsity),
    }.get(method, (weights.RATE, 1.0))
    return "relative_rate", rate / (free * size) ** 0.5


def width_and_depth(shape: dict[str, Any]) -> float:
    """Their product, of a config.json."""
    return float(shape["hidden_size"] * shape["num_hidden_layers"])


def text_of(model: Path, data: Path, run: Run) -> str:
    """The plan of one run; its rate is a multiple of the default."""
    name, rate = default_rate(run.method, model)
    text = plan_text(model, data, replace(run, rate=0.0))
    text = text.replace(
        "max_rows = 1500\nbatch_size = 32\nmicro_batch_size = 32",
        f"max_rows = {ROWS}\nbatch_size = {BATCH}\nmicro_batch_size = {BATCH}",
    )
    return text.replace("epochs = 2\n", f"epochs = 1\n{name} = {run.rate * rate:.4g}\n", 1)


def trials(method: str) -> list[Run]:
    """What a rate is chosen by."""
    return [Run("1", method, multiple) for multiple in MULTIPLES]


def chosen(method: str, done: dict[Run, Content | None]) -> Run | None:
    """The best of three, where all have ended."""
    found = [done[run] for run in trials(method) if run in done]
    if len(found) < len(MULTIPLES) or not any(found):
        return None
    return max((run for run in trials(method) if done[run]), key=lambda run: average(done[run]))


def average(content: Content | None) -> float:
    """AA."""
    assert content is not None
    return float(content["metrics"]["average"])


def follow(done: dict[Run, Content | None]) -> list[Run]:
    """Test rows at the chosen rate, in both orders; of the best two, once all are chosen, two more seeds."""
    best = {method: run for method in (*NEIGHBOURS, *BESIDE) if (run := chosen(method, done)) is not None}
    more = [Run(order, run.method, run.rate, split="test") for run in best.values() for order in "12"]
    if all(all(run in done for run in trials(method)) for method in NEIGHBOURS):
        first = sorted((m for m in NEIGHBOURS if m in best), key=lambda m: -average(done[best[m]]))[:2]
        seeds = [
            (method, seed, order)
            for method in (*first, "sculptor")
            if method in best
            for seed in (1, 2)
            for order in "12"
        ]
        more += [Run(order, method, best[method].rate, seed=seed, split="test") for method, seed, order in seeds]
    return more


SUITES = {
    "all": [run for method in (*BESIDE, *NEIGHBOURS) for run in trials(method)],
    "first": [run for method in BESIDE for run in trials(method)],
    "rest": [run for method in NEIGHBOURS for run in trials(method)],
}


def table(path: Path) -> None:
    """Of results on test rows; what was tried on validation rows behind it."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line.get("split") == "test"]
    print("| | rate | order | AA | BWT | LA | WikiText-2 | own answers | harm | s a task | GPU memory | kept |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for method in (*BESIDE, *NEIGHBOURS):
        for order in "12":
            mine = [line for line in found if line["run"].split()[:2] == [f"o{order}", method]]
            if mine:
                print(_row(method, order, mine))
    print()
    for method in (*BESIDE, *NEIGHBOURS):
        tried = {
            line["run"].split()[2]: line
            for line in lines
            if line.get("split") == "validation" and line["method"] == method
        }
        figures = [f"{multiple} {100 * line['metrics']['average']:.1f}" for multiple, line in sorted(tried.items())]
        print(f"{method}: {', '.join(figures)}")


def _row(method: str, order: str, lines: list[Content]) -> str:
    """Means over seeds."""

    def mean(values: list[float | None], scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
        numbers = [scale * value for value in values if value is not None]
        if not numbers:
            return ""
        spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 2 else ""
        return f"{statistics.mean(numbers):{sign}.{digits}f}{spread}"

    last = [line["stages"][-1] for line in lines]
    rises = [
        {name: value - line["stages"][0]["watched"][name] for name, value in line["stages"][-1]["watched"].items()}
        for line in lines
    ]
    watched = [mean([rise[name] for rise in rises], digits=3, sign="+") for name in rises[0]]
    seconds = [stage["seconds"] for line in lines for stage in line["stages"][1:]]
    memory = [stage.get("peak_bytes") for line in lines for stage in line["stages"][1:]]
    peak = max((value for value in memory if value), default=None)
    kept = [stage["archive_bytes"] for stage in last]
    cells = [
        method,
        f"{lines[0]['run'].split()[2]} x",
        order,
        *(
            mean([line["metrics"][key] for line in lines], 100, sign=sign)
            for key, sign in (("average", ""), ("backward", "+"), ("learning", ""))
        ),
        *watched,
        mean([(stage["harm"] or {}).get("nats") for stage in last], digits=3),
        f"{statistics.median(seconds):.0f}",
        "" if peak is None else f"{peak / 2**30:.1f} GiB",
        mean(kept, 1e-6) + (" MB" if any(kept) else ""),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        table(Path(sys.argv[2]))
    else:
        run_suites(SUITES, text_of, __doc__ or "", follow=follow)


if __name__ == "__main__":
    main()
