"""How the rules of a model's matrices come about, and how they go on after a task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from sculptor.methods.rule import Rule, Tensors
from sculptor.methods.settings import Carry

# What has to be measured on rows: nothing, each matrix's cosine of input and output, second moments of what it reads, or
# of that and of the gradients of what it writes.
Measures = Literal["nothing", "cosines", "inputs", "gradients"]
# When: rules are derived by an analysis, opened for a task before its first step, or carried on after it.
Step = Literal["derive", "open", "carry"]


@dataclass(frozen=True, eq=False)
class Moment:
    """A second moment (d, d), summed over sources of unit trace, each by its weight; one object for all who read it."""

    value: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Evidence:
    """What is known of a matrix when its rule is made.

    Attributes:
        name: of the matrix, `shape` (m, n) of it.
        weight: reads it, (m, n), float64, on the device of the analysis.
        cosine: importance by cosines, 1 on average over matrices; None if not measured.
        update: dW (m, n) of the finished task, float64; None in an analysis, or where moments are measured instead.
        inputs, outputs: moments, as far as they were measured.
        traces: (tr C, tr G) of every source before it was scaled.
        task: position of the task in the archive's history; 0 is the analysis.
    """

    name: str
    shape: tuple[int, int]
    weight: Callable[[], Tensor]
    cosine: float | None = None
    update: Tensor | None = None
    inputs: Moment | None = None
    outputs: Moment | None = None
    traces: tuple[tuple[float, float], ...] = ()
    task: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Derived:
    """A rule and the tensors to store with it; those in `shared` are the same for all matrices that read one input."""

    rule: Rule
    tensors: Tensors
    shared: frozenset[str] = field(default_factory=frozenset)


class Previous(Protocol):
    """A rule and its stored tensors, as an archive holds them."""

    @property
    def rule(self) -> Rule: ...
    @property
    def tensors(self) -> Tensors: ...


class Terms(NamedTuple):
    """What reports call things.

    Attributes:
        basis: where the rules come from; `constraint` what they forbid.
        share: heading of `Figures.preserved`, `held` of `Figures.held`, and `note` what that is.
        adds: whether shares of several matrices add up by entries (pairs) rather than by matrix (directions).
    """

    basis: str
    constraint: str
    share: str
    held: str
    note: str
    adds: bool


class Defaults(NamedTuple):
    """What training does unless told otherwise.

    Attributes:
        relative_rate: learning rate of coordinates over the RMS of their matrix.
        soften: strength of the slowing down; None where the rule knows none.
    """

    relative_rate: float
    soften: float | None = None


class Method(Protocol):
    """Makes and carries rules; made for the settings of an analysis.

    Attributes:
        terms: words for reports.
        defaults: of training.
        carries: the ways in which rules can go on, the default first.
    """

    terms: Terms
    defaults: Defaults
    carries: tuple[Carry, ...]

    def check(self, shapes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """What contradicts itself, has no effect, or does not go with matrices of some shapes: one message each."""

    def measures(self, step: Step, carry: Carry | None = None) -> Measures:
        """What a step needs to be measured; a step that needs nothing of `open` does not happen."""

    def derive(self, evidence: Evidence) -> Derived:
        """The rule of one matrix."""

    def open(self, previous: Previous, evidence: Evidence) -> Derived:
        """The rule for a task whose rows were measured before its first step."""

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """The rule after a task."""

    def decide(
        self, rules: Sequence[Rule], weights: Sequence[float], read: Callable[[int, str], Tensor]
    ) -> Sequence[Rule]:
        """The rules of all matrices, now that all are known.

        Args:
            rules: in the order of the model.
            weights: of the sources of moments so far.
            read: gives a stored tensor of one of them.
        """

    def growth(self, carry: Carry, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes by which a matrix's tensors can grow with a task; `sizes` are bytes per number, by tensor."""
