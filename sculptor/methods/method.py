"""How the rules of a model's matrices come about, and how they go on after a task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

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
    """A rule and the tensors to store with it.

    Attributes:
        rule: what may change.
        tensors: by the rule's names.
        shared: those that are the same for all matrices that read one input.
        exact: bases that hold what an earlier archive protects, and that rounding must not turn: float32 at least.
    """

    rule: Rule
    tensors: Tensors
    shared: frozenset[str] = field(default_factory=frozenset)
    exact: frozenset[str] = field(default_factory=frozenset)


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
        budget: share of entries that was asked to be left free, where one was.
    """

    basis: str
    constraint: str
    share: str
    held: str
    note: str
    adds: bool
    budget: float | None = None


class Defaults(NamedTuple):
    """What training does unless told otherwise.

    Attributes:
        rate: c of the learning rate (`training/rates.py`): a step's relative size, width and depth taken out.
        soften: strength of the slowing down; None where the rule knows none.
        scaled: whether coordinates are in the units of the matrix, as angles are not.
        memory_weight: of a task's moments against those of one earlier source; None where moments do not add up.
    """

    rate: float
    soften: float | None = None
    scaled: bool = True
    memory_weight: float | None = None


class Method(Protocol):
    """Makes rules; made for the settings of an analysis.

    Some can do more: `Measuring`, `Carrying`, `Plans`, `Checks`, `Opens`, `Decides`, `Grows`.

    Attributes:
        terms: words for reports.
        defaults: of training.
    """

    terms: Terms
    defaults: Defaults

    def derive(self, evidence: Evidence) -> Derived:
        """The rule of one matrix; on a GPU several threads ask, each for matrices of its own inputs."""


@runtime_checkable
class Measuring(Protocol):
    """A method that looks at rows."""

    def measures(self, step: Step, carry: Carry | None = None) -> Measures:
        """What a step needs to be measured."""


@runtime_checkable
class Carrying(Protocol):
    """A method whose rules change with a finished task; those of others are kept.

    Attributes:
        carries: the ways in which rules can go on, the default first; `keep` is possible even if it is not among them.
    """

    carries: tuple[Carry, ...]

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """The rule after a task, in any way but `keep`."""


@runtime_checkable
class Plans(Protocol):
    """A method whose rules follow from shapes as far as an estimate has to know them."""

    def plan(self, shape: tuple[int, int]) -> Rule:
        """The rule that an analysis would give a matrix (m, n)."""


@runtime_checkable
class Checks(Protocol):
    """A method that does not go with every setting, or every model."""

    def check(self, shapes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """What contradicts itself, has no effect, or does not go with matrices of some shapes: one message each."""


@runtime_checkable
class Opens(Protocol):
    """A method whose rules follow the new task's rows, measured before its first step."""

    def open(self, previous: Previous, evidence: Evidence) -> Derived:
        """The rule that the task is trained under; `measures("open")` says what is known of the rows."""


@runtime_checkable
class Decides(Protocol):
    """A method whose rules depend on each other."""

    def decide(
        self, rules: Sequence[Rule], weights: Sequence[float], read: Callable[[int, str], Tensor]
    ) -> Sequence[Rule]:
        """The rules of all matrices, now that all are known.

        Args:
            rules: in the order of the model.
            weights: of the sources of moments so far.
            read: gives a stored tensor of one of them.
        """


@runtime_checkable
class Grows(Protocol):
    """A method whose archives grow with tasks."""

    def growth(self, carry: Carry, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes by which a matrix's tensors can grow with a task; `sizes` are bytes per number, by tensor."""


def measures_of(method: Method, step: Step, carry: Carry | None = None) -> Measures:
    """What a step of any method needs to be measured; keeping rules needs nothing.

    Raises:
        ValueError: if a method asks for what the step cannot give.
    """
    if carry == "keep" or not isinstance(method, Measuring):
        return "nothing"
    measures = method.measures(step, carry)
    if measures == "cosines" and step != "derive":
        raise ValueError(f"cosines are measured for an analysis alone, not to {step} rules")
    return measures


def carries_of(method: Method) -> tuple[Carry, ...]:
    """The ways in which the rules of any method can go on, the default first."""
    return tuple(dict.fromkeys((*method.carries, "keep"))) if isinstance(method, Carrying) else ("keep",)
