"""What an edit has to say: how much of the difference stays, by role, and how its free number was chosen."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sculptor.edits.difference import Norms

Measure = Literal["accuracy", "loss"]


@dataclass(frozen=True, slots=True)
class RoleChange:
    """The tensors of one role.

    Attributes:
        role: which.
        num_tensors: how many there are.
        difference: ||W1 - W0|| / ||W0||, over all of them.
        stays: ||W - W0|| / ||W1 - W0||, of what is written; 0 where there is no difference.
    """

    role: str
    num_tensors: int
    difference: float
    stays: float


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate.

    Attributes:
        alpha, soft: its numbers; `soft` is None where the edit has none.
        task: accuracy on the task's rows, or their loss in nats per token.
        watch: loss of the watched text in nats per token.
        kept: of what tuning gained on the task; 0 for BASE, 1 for TUNED.
        back: of what tuning lost on the text; 1 for BASE, 0 for TUNED.
    """

    alpha: float
    soft: float | None
    task: float
    watch: float
    kept: float
    back: float

    @property
    def score(self) -> float:
        """What is made largest: 2 kept + back, the trade-off of LiNeS."""
        return 2 * self.kept + self.back


@dataclass(frozen=True, slots=True)
class Choice:
    """How a free number was chosen.

    Attributes:
        measure: what the task was measured by: ranking labels, or loss where there are none.
        base, tuned: (task, watch) of the two.
        points: every candidate.
        best: which of them was taken.
    """

    measure: Measure
    base: tuple[float, float]
    tuned: tuple[float, float]
    points: tuple[Point, ...]
    best: int


@dataclass(frozen=True, slots=True)
class EditReport:
    """The result of `edit`.

    Attributes:
        command: which edit.
        output: what was written; None of a dry run.
        numbers: the settings, as they were used.
        roles: by role, and `all` of them together.
        copied: base or tuned: of which everything else is.
        not_taken: what of TUNED's tokenizer and configuration the output does not have.
        choice: how free numbers were chosen, if they were.
    """

    command: str
    output: Path | None
    numbers: dict[str, float]
    roles: tuple[RoleChange, ...]
    all: RoleChange
    copied: str
    not_taken: tuple[str, ...]
    choice: Choice | None = None


class Tally:
    """Norms by role, added up as tensors are edited."""

    def __init__(self) -> None:
        self._norms: dict[str, list[Norms]] = defaultdict(list)
        self._names: dict[str, set[str]] = defaultdict(set)

    def add(self, role: str, name: str, norms: Norms) -> None:
        """One tensor, or a slice of one."""
        self._norms[role].append(norms)
        self._names[role].add(name)

    def roles(self) -> tuple[RoleChange, ...]:
        """By role, in the order they came."""
        return tuple(self._sum(role, [role]) for role in self._norms)

    def total(self) -> RoleChange:
        """All roles together."""
        return self._sum("all", list(self._norms))

    def _sum(self, name: str, roles: Sequence[str]) -> RoleChange:
        columns = zip(*(norms for role in roles for norms in self._norms[role]), strict=True)
        base, difference, stays = (sum(column) ** 0.5 for column in columns)
        count = sum(len(self._names[role]) for role in roles)
        return RoleChange(name, count, difference / (base or 1.0), stays / (difference or 1.0))
