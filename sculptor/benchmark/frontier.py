"""What several sequences learned, against the harm that they did: the frontier."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculptor.benchmark.finished import Finished, read_finished
from sculptor.errors import SettingsError

HARM, FIRST = "harm", "harm.first"


@dataclass(frozen=True, slots=True)
class Mean:
    """Over the seeds of a point.

    Attributes:
        mean: of all seeds.
        deviation: the standard deviation; None with one seed.
    """

    mean: float
    deviation: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: the method, and of what differs from other points of the same method, the values.
        method: as `sculptor continual --method` has it, with the basis of our own.
        tasks: in the order in which they were learned.
        seeds: one for each run.
        average, backward, learning: AA, BWT and LA of `sculptor.evaluation.matrix`.
        harm: KL(base || last) in nats a token; None where a run did not measure it.
        first: the same at the first tokens of answers alone.
        watched: rise of the loss on each watched text, in nats a token.
        seconds: of training, for the whole sequence.
    """

    name: str
    method: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    average: Mean
    backward: Mean | None
    learning: Mean | None
    harm: Mean | None
    first: Mean | None
    watched: Mapping[str, Mean]
    seconds: Mean

    def cost(self, against: str | None) -> Mean | None:
        """What was done to what the model knew: `HARM`, `FIRST`, or the rise on a watched text."""
        found = {HARM: self.harm, FIRST: self.first}.get(against or "")
        return self.watched.get(against or "") if found is None else found


@dataclass(frozen=True, slots=True)
class Frontier:
    """Points of the same tasks, in the order of what they cost.

    Attributes:
        tasks: names of them, in order.
        split: which files of the tasks were evaluated, test or validation.
        metric: what AA is of: accuracy, exact_match, or loss (negative, so that more is better).
        against: what they cost: `HARM`, `FIRST`, or the name of a watched text; None where no run measured either.
        points: runs, put together where they differ in their seed alone.
    """

    tasks: tuple[str, ...]
    metric: str
    split: str
    against: str | None
    points: tuple[Point, ...]


def frontier(runs: Sequence[str | Path], against: str | None = None) -> Frontier:
    """Reads finished runs of the same tasks, in any order, and puts those together that differ in their seed alone.

    Args:
        runs: outputs of `sculptor continual`, or their continual.json.
        against: `HARM`, `FIRST`, or the name of a text that the runs watched; default harm, or else the first text.

    Returns:
        The points, cheapest first.

    Raises:
        DataError: if one cannot be read.
        SettingsError: if they are of other tasks, rows or measures, or one is there twice, or none measured `against`.
    """
    if not runs:
        raise SettingsError("no runs: name at least one output of `sculptor continual`")
    found = [read_finished(run) for run in runs]
    for run, one in zip(runs[1:], found[1:], strict=True):
        for what in ("metric", "split"):
            if getattr(one, what) != getattr(found[0], what):
                raise SettingsError(
                    f"{run}: {what} {getattr(one, what)}, expected {getattr(found[0], what)} as in {runs[0]}"
                )
        if set(one.tasks) != set(found[0].tasks):
            raise SettingsError(
                f"{run}: tasks {_listed(one.tasks)}, expected {_listed(found[0].tasks)} as in {runs[0]}"
            )
    groups: dict[str, list[int]] = defaultdict(list)
    for i, one in enumerate(found):
        groups[json.dumps([_method(one), _unseeded(one.plan)], sort_keys=True)].append(i)
    for members in groups.values():
        seeds = [found[i].seed for i in members]
        twice = next((i for n, i in enumerate(members) if found[i].seed in seeds[:n]), None)
        if twice is not None:
            raise SettingsError(f"{runs[twice]}: a run of the same plan and seed {found[twice].seed} is there already")
    points = [
        _point([found[i] for i in members], _name(found, members, groups.values())) for members in groups.values()
    ]
    against = _against(points, against)
    points.sort(key=lambda point: _order(point, against))
    return Frontier(found[0].tasks, found[0].metric, found[0].split, against, tuple(points))


def _against(points: Sequence[Point], asked: str | None) -> str | None:
    measured = [HARM, FIRST] if any(point.harm is not None for point in points) else []
    measured += dict.fromkeys(text for point in points for text in point.watched)
    if asked is None:
        return measured[0] if measured else None
    if asked not in measured:
        raise SettingsError(
            f"--against {asked}: expected one of {', '.join(measured) or 'nothing'}, which the runs measured"
        )
    return asked


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))


def _method(run: Finished) -> str:
    return run.method + (f" ({run.basis})" if run.method == "sculptor" and run.basis else "")


def _unseeded(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan without the seeds: neither that of training nor that of the analysis."""
    return {
        key: {name: item for name, item in value.items() if name != "seed"} if isinstance(value, dict) else value
        for key, value in plan.items()
        if key != "seed"
    }


def _name(found: Sequence[Finished], members: Sequence[int], groups: Collection[list[int]]) -> str:
    """The method, with the settings in which it differs from the other points of this method."""
    first = found[members[0]]
    others = [found[group[0]] for group in groups if _method(found[group[0]]) == _method(first)]
    flat = [dict(_flat(_unseeded(one.plan))) for one in others]
    own = dict(_flat(_unseeded(first.plan)))
    names = sorted({key for each in flat for key in each if "." in key})
    differs = [key for key in names if len({each.get(key) for each in flat}) > 1]
    values = {key.rpartition(".")[2]: json.loads(own.get(key, "null")) for key in differs}
    told = [
        f"{key.replace('learning_rate', 'rate').replace('_', ' ')} {value}"
        for key, value in values.items()
        if value is not None
    ]
    told += ["defaults"] if differs and not told else []
    if len({one.tasks for one in others}) > 1:
        told.append(f"{first.tasks[0]} first")
    return ", ".join([_method(first), *told])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings as `section.name` and JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value)


def _point(runs: Sequence[Finished], name: str) -> Point:
    def mean(of: Callable[[Finished], float | None]) -> Mean | None:
        values = [of(run) for run in runs]
        return None if None in values else _mean([value for value in values if value is not None])

    watched = {text: mean(lambda run, text=text: _rise(run, text)) for text in runs[0].stages[0].watched}  # type: ignore[misc]
    return Point(
        name=name,
        method=_method(runs[0]),
        tasks=runs[0].tasks,
        seeds=tuple(sorted(run.seed for run in runs)),
        average=_mean([run.metrics.average for run in runs]),
        backward=mean(lambda run: run.metrics.backward),
        learning=mean(lambda run: run.metrics.learning),
        harm=mean(lambda run: None if run.harm is None else run.harm.nats),
        first=mean(lambda run: None if run.harm is None else run.harm.first),
        watched={text: value for text, value in watched.items() if value is not None},
        seconds=_mean([sum(stage.seconds for stage in run.stages) for run in runs]),
    )


def _rise(run: Finished, text: str) -> float | None:
    last = run.stages[-1].watched.get(text)
    return None if last is None else last - run.stages[0].watched[text]


def _mean(values: Sequence[float]) -> Mean:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Mean(mean, None)
    return Mean(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)))


def _order(point: Point, against: str | None) -> tuple[float, float]:
    cost = point.cost(against)
    return (math.inf if cost is None else cost.mean), -point.average.mean
