"""What a rule is: which changes of a matrix are allowed, as coordinates that any optimizer may move.

A rule maps coordinates A to an update dW(W0, A) of a matrix W0 (m, n), with dW = 0 at A = 0; whatever A is, the update is
allowed. A rule is a frozen dataclass of facts, which archive.json holds as `rule: {kind, ...}`; its tensors are stored
beside it and handed to its functions by name. `update` and `project` take a leading stack of matrices of one shape, too:
W0 (..., m, n), with tensors and coordinates of the same leading sizes. `Stackable` is for rules that differ in their facts.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sculptor.numerics.free_space import Name, Order

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class OuterProduct:
    """A gradient with respect to W as what it is the sum of: dY^T X. Turned before it is summed it costs less.

    Attributes:
        inputs: X (..., t, n), what the matrix read.
        outputs: dY (..., t, m), the gradient of what it wrote.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Narrowed:
    """A gradient with respect to W of which a rule has read one side already.

    Attributes:
        values: (m, q) or (p, n), as the rule has made them.
        name: which side that was, "output" or "input".
    """

    values: Tensor
    name: Name


Gradient = Tensor | OuterProduct | Narrowed


def dense(gradient: Gradient) -> Tensor:
    """The gradient with respect to W, (..., m, n).

    Raises:
        TypeError: if a side of it is gone.
    """
    if isinstance(gradient, Narrowed):
        raise TypeError("a narrowed gradient is for the rule that has narrowed it")
    return gradient.outputs.mT @ gradient.inputs if isinstance(gradient, OuterProduct) else gradient


@dataclass(frozen=True, eq=False, slots=True)
class Working:
    """How a rule's tensors are wanted for training, or for the merge.

    Attributes:
        device: where.
        dtype: in which products are formed; float64 for the merge.
        soften: how strongly what matters is slowed down; 0 for not at all.
        names: stored tensor behind each of the rule's; matrices may share one.
        known: what was made for other matrices, by anything that identifies it.
    """

    device: torch.device
    dtype: torch.dtype
    soften: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)


class Prepared(NamedTuple):
    """A rule's tensors as `update` and `project` take them, and numbers that tell them from others up to rounding."""

    tensors: dict[str, Tensor]
    fingerprint: list[float]


class Detail(NamedTuple):
    """What `verify` asks of a violation beside its size.

    Attributes:
        peak: spectral norm of what is not allowed, or its largest entry; None where the rule does not tell.
        peak_rounding: what rounding errors, which have no direction, can make of it.
        touched: of what the rule weighs, what the update disturbs; None where it weighs nothing.
        touched_at_random: the mean of that over all updates of this norm.
    """

    peak: float | None = None
    peak_rounding: float | None = None
    touched: float | None = None
    touched_at_random: float | None = None


class Violation(NamedTuple):
    """How far an update leaves what is allowed, in the units of ||dW||.

    Attributes:
        norm: of what is not allowed.
        rounding: its expectation from the rounding errors of what is stored.
        num_pairs: how many independent errors that sums up.
        detail: gives the rest, which takes several times as long.
    """

    norm: float
    rounding: float
    num_pairs: int
    detail: Callable[[], Detail] = Detail


class Figures(NamedTuple):
    """What people are told of a matrix.

    Attributes:
        preserved: share of directions, or pairs, that may not change.
        held: what these hold, of whatever the method measures.
        added: what each task added, by its position in the history: (outputs, inputs).
    """

    preserved: float
    held: float
    added: Mapping[int, tuple[int, int]]


class Cost(NamedTuple):
    """What training takes of a rule's tensors: numbers by tensor (shared ones have one name), operations of an update."""

    numbers: Mapping[str, int]
    operations: float


class Rule(Protocol):
    """What may change in one matrix.

    Attributes:
        orthonormal: which of its stored tensors have orthonormal columns; the reader checks them, and makes them exact
            where they are stored in less than float32.
        reads_weight: whether `update` and `project` read W0 and A. Where not, both may be empty in `project`.
    """

    orthonormal: ClassVar[frozenset[str]]
    reads_weight: ClassVar[bool]

    @property
    def kind(self) -> str:
        """Its name in archives."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in)."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the coordinates A; none where nothing may change."""

    def stored(self) -> Mapping[str, tuple[int | None, ...]]:
        """Its tensors in an archive: name and shape, None for a size that the rule does not know."""

    def prepare(self, tensors: Tensors, working: Working) -> Prepared:
        """Stored tensors as training or the merge use them."""

    def update(self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor]) -> Tensor:
        """dW (..., m, n), for prepared tensors."""

    def project(
        self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor], gradient: Gradient
    ) -> tuple[Tensor, ...]:
        """The gradient of every A, contiguous; float32, or float64 with tensors of that dtype."""

    def violation(self, tensors: Tensors, weight: Tensor, update: Tensor, variance: Tensor) -> Violation:
        """Judges an update of one matrix.

        Args:
            tensors: as stored.
            weight: W0 (m, n), float64.
            update: W - W0, float64.
            variance: of the rounding error of each entry of W, float64.
        """

    def figures(self) -> Figures:
        """What people are told."""


@runtime_checkable
class Costly(Protocol):
    """A rule whose tensors and updates count beside the coordinates."""

    def cost(self, names: Mapping[str, str]) -> Cost:
        """What training takes; `names` are those of the stored tensors, by the rule's own."""


def cost_of(rule: Rule, names: Mapping[str, str]) -> Cost:
    """What training takes of a rule; nothing where nothing may change."""
    return rule.cost(names) if isinstance(rule, Costly) and is_open(rule) else Cost({}, 0.0)


@runtime_checkable
class Narrowing(Protocol):
    """A rule that can read a side of a gradient before its rows are summed, which may be less to sum, to keep, and to send."""

    def order(self, tokens: float) -> Order:
        """How `project` takes the least for an `OuterProduct` of so many tokens; "after" if it had better be summed before."""

    def multiplications(self, tokens: float) -> Mapping[Order, float]:
        """What `project` takes in every order, the sum over tokens with it."""

    def narrowing(self, name: Name) -> tuple[tuple[int, int], Mapping[str, tuple[int, ...]]]:
        """The shape of a gradient that is narrowed on a side, and of the prepared tensors that this takes."""

    def narrow(self, tensors: Tensors, gradient: Tensor | OuterProduct, name: Name) -> Narrowed:
        """For `project`, which gives the same up to rounding; `tensors` are at least those of `narrowing`."""


@runtime_checkable
class Projectable(Protocol):
    """A rule that says what of a finished update is allowed."""

    def projection(self, weight: Tensor, tensors: Tensors, soften: float = 0.0) -> Callable[[Tensor], Tensor]:
        """What gives the part of dW (m, n), float64, that stays; twice is once. With `soften`, less of what matters.

        Args:
            weight: W0 (m, n), float64, on the device of the updates.
            tensors: as stored.
            soften: how strongly what matters is reduced, where the rule knows that; 0 for not at all.
        """


@runtime_checkable
class Weighing(Protocol):
    """A rule that knows what changes of single entries cost."""

    def entry_curvature(self, tensors: Tensors) -> tuple[Tensor, Tensor] | None:
        """h (m,) and w (n,), float64: a change of entry (i, j) costs h_i w_j dW_ij^2 / 2; None where nothing was measured."""


class RuleStack(Protocol):
    """Rules of one kind and shape (m, n) that are folded and projected with at once; coordinates are those of each.

    Of rules that do not read W0, which would have to be copied into one piece for that.
    """

    def prepare(self, tensors: Sequence[Tensors]) -> Tensors:
        """Prepared tensors of each as the two others take them: stacked, where they have one shape."""

    def update(self, tensors: Tensors, coordinates: Sequence[Sequence[Tensor]]) -> Tensor:
        """dW (s, m, n)."""

    def project(
        self, tensors: Tensors, coordinates: Sequence[Sequence[Tensor]], gradients: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """As `Rule.project`, for gradients (s, m, n)."""


@runtime_checkable
class Stackable(Protocol):
    """A rule that can be taken together with others like it: for small matrices, starting work costs more than doing it."""

    def stack_key(self, tensors: Tensors) -> Hashable:
        """Equal for matrices that go together; `tensors` as prepared."""

    def stack(self, others: Sequence[Any]) -> RuleStack:
        """Of this rule and others of the same key, in order."""


class TaskShares(NamedTuple):
    """How the tasks so far share a matrix: (tasks,) and (tasks, tasks), float64.

    Attributes:
        held: share of each task's own curvature in what is frozen.
        overlaps: of every two, by cosine.
    """

    held: Tensor
    overlaps: Tensor


class Spectrum(NamedTuple):
    """Values of directions, descending, for a picture.

    Attributes:
        what: they are.
        values: as many as are stored.
        dim: of how many.
        protected: how many of them are.
    """

    what: str
    values: Tensor
    dim: int
    protected: int


@runtime_checkable
class Directed(Protocol):
    """A rule that tells directions apart, so that they can be drawn and compared."""

    def directions(self, tensors: Tensors) -> tuple[Tensor | None, Tensor | None]:
        """Protected output and input directions, orthonormal columns (m, ku) and (n, kv)."""

    def spectrum_of(self, tensors: Tensors) -> Spectrum | None:
        """What to draw of them; None where nothing is known."""

    def shares(self, tensors: Tensors) -> TaskShares | None:
        """How the tasks so far share it; None where that is not known."""


def num_free(rule: Rule) -> int:
    """How many coordinates a rule has."""
    return sum(prod(shape) for shape in rule.shapes)


def is_open(rule: Rule) -> bool:
    """Whether anything may change."""
    return num_free(rule) > 0
