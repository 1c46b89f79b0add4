"""continual.json of a finished run, read back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from sculptor.benchmark.results import Stage
from sculptor.errors import DataError
from sculptor.model.harm import Harm
from sculptor.validation import STRICT, Count, Finite, Name, read_file, read_json

_REMEDY = "name the output of a finished `sculptor continual`"


@dataclass(frozen=True, slots=True)
class Metrics:
    """As `sculptor.evaluation.matrix.ContinualMetrics`."""

    __pydantic_config__ = STRICT

    average: Finite
    backward: Finite | None
    learning: Finite | None
    forward: Finite | None


@dataclass(frozen=True, slots=True)
class Finished:
    """What is needed of a run; as in `sculptor.benchmark.results.ContinualReport`.

    Attributes:
        plan: with method and split, as published: no folders.
    """

    method: Name
    basis: Name | None
    split: Name
    seed: Count
    tasks: tuple[Name, ...]
    metric: Literal["accuracy", "exact_match", "loss"]
    metrics: Metrics
    stages: tuple[Stage, ...]
    plan: Mapping[str, JsonValue]
    watch_rise: Finite | None = None
    harm: Harm | None = None

    __pydantic_config__ = STRICT | {"extra": "ignore"}


def read_finished(place: str | Path) -> Finished:
    """The report of a run.

    Args:
        place: the run's output, or its continual.json.

    Raises:
        DataError: if there is none, or it is damaged.
    """
    path = Path(place) / "continual.json" if Path(place).is_dir() else Path(place)
    found = read_json(Finished, read_file(path, DataError, _REMEDY), path, DataError, _REMEDY)
    if len(found.stages) < 2:
        raise DataError(
            f"{path}: damaged (stages: found {len(found.stages)}, expected the base and one more); {_REMEDY}"
        )
    return found
