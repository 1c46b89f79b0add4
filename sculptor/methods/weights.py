"""Protected directions from weights alone, and how they go on by what a task did to the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sculptor.methods.method import Defaults, Derived, Evidence, Measures, Previous, Step, Terms
from sculptor.methods.ranks import adaptive_retention, protected_count
from sculptor.methods.rule import Rule, Tensors, is_open
from sculptor.methods.settings import SELF, AnalyzeSettings, Carry
from sculptor.methods.sides import Added, Side, side_of
from sculptor.methods.staircase import StaircaseRule
from sculptor.numerics.bases import Basis, extend, most_columns, store_smaller, stored_columns
from sculptor.numerics.chance import generator_of
from sculptor.numerics.linalg import singular_subspaces
from sculptor.numerics.staircase import Constraint, Staircase

ENERGY_SHARE = 0.95
FREE_SHARE = 0.25
# Of the learning rate; measured for `weights` on three models (docs/benchmarks.md), at which `random` is set too.
RATE = 0.1


@dataclass(frozen=True, eq=False, slots=True)
class MatrixSubspaces:
    """What the analysis of one matrix gives.

    Attributes:
        staircase: which pairs are frozen.
        output, input: the stored sides, float64; None where the constraint needs none.
        spectrum: all singular values (min(m, n),), float64, descending; None if nothing was decomposed.
        energy: share of ||W||^2 in the protected directions.
    """

    staircase: Staircase
    output: Basis | None
    input: Basis | None
    spectrum: Tensor | None
    energy: float


def analyze_matrix(weight: Tensor, constraint: Constraint, k: int) -> MatrixSubspaces:
    """Protects the `k` leading singular directions of a matrix.

    Args:
        weight: (m, n) = (out, in), any floating dtype; decomposed in float64 on its device.
        constraint: what is frozen of them.
        k: how many; 0 decomposes nothing and freezes nothing.
    """
    m, n = weight.shape
    staircase = Staircase.of(constraint, m, n, k, k)
    if k == 0:
        return MatrixSubspaces(staircase, None, None, None, 0.0)
    left, values, right = singular_subspaces(weight, k)
    squares = values.square()
    energy = float(squares[:k].sum() / squares.sum()) if float(squares.sum()) > 0 else 1.0
    return MatrixSubspaces(
        staircase,
        output=None if constraint == "input" else store_smaller(left),
        input=store_smaller(right),
        spectrum=values,
        energy=energy,
    )


def random_directions(weight: Tensor, constraint: Constraint, k: int, seed: str) -> MatrixSubspaces:
    """`k` random directions per side instead of the leading ones: the control that any choice has to beat.

    Args:
        weight: (m, n); only its shape and norms are used.
        constraint: what is frozen of them.
        k: how many.
        seed: any text; the same gives the same directions.
    """
    m, n = weight.shape
    if k == 0:
        return analyze_matrix(weight, constraint, 0)
    generator = generator_of(seed)
    left, right = (
        torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))[0].to(weight.device)
        for d in (m, n)
    )
    weight64 = weight.to(torch.float64)
    norm = float(weight64.square().sum())
    return MatrixSubspaces(
        Staircase.of(constraint, m, n, k, k),
        output=None if constraint == "input" else store_smaller(left),
        input=store_smaller(right),
        spectrum=None,
        energy=float((left.T @ weight64 @ right).diagonal().square().sum()) / norm if norm > 0 else 1.0,
    )


class Weights:
    """Leading singular directions of each matrix (the paper), or as many at random: the control that any choice has to beat.

    Two ways to go on. `accumulate`: bases only grow. The leading singular vectors of dW are appended, the fewest that hold
    95 % of ||dW||^2, at most a quarter of the directions still free, and never the last free one: a matrix whose task needs
    that one is frozen from then on. `retake`: the weights are decomposed again (the paper), which forgets what lies in small
    singular directions.
    """

    carries: tuple[Carry, ...] = ("accumulate", "retake")
    defaults = Defaults(rate=RATE)

    def __init__(self, settings: AnalyzeSettings) -> None:
        self.settings = settings
        self.constraint: Constraint = settings.constraint or "double"
        self.terms = Terms(
            basis=settings.resolved_basis,
            constraint=self.constraint,
            share="preserved",
            held="energy kept",
            note="energy kept: of ||W||^2, at analysis",
            adds=False,
        )

    def check(self, shapes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """What does not go with singular or random directions."""
        settings = self.settings
        basis = f"with --basis {settings.resolved_basis}"
        idle = settings.given(
            "budget",
            "chat",
            "calibration_tokens",
            "keep",
            "row_groups",
            "threshold",
            "fisher",
            "weighting",
            "device_memory",
        )
        wrong = [f"{', '.join(idle)} without effect {basis}; use inputs or curvature"] if idle else []
        if settings.max_length is not None and not settings.data:
            wrong.append("--max-length without effect: there is no --data")
        if SELF in settings.data:
            wrong.append(f"--data self without effect {basis}; use inputs or curvature")
        if settings.preserve is None:
            low, high = settings.retention_range
            return [*wrong, f"--min-retention {low} is above --target-retention {high}"] if low > high else wrong
        if settings.preserve == 1:
            wrong.append("--preserve 1: no direction would be left to train; use less than 1")
        idle = settings.given("min_retention", "target_retention", "data")
        if idle:
            wrong.append(
                f"{', '.join(idle)} without effect: --preserve fixes the rank of every matrix; drop one of the two"
            )
        return wrong

    def measures(self, step: Step, carry: Carry | None = None) -> Measures:
        """Importance for the adaptive rank, where there are rows."""
        return "cosines" if step == "derive" and self.settings.data else "nothing"

    def plan(self, shape: tuple[int, int]) -> Rule:
        """By the shape alone, with `preserve`."""
        m, n = shape
        k = round((self.settings.preserve or 0.0) * min(m, n))
        staircase = Staircase.of(self.constraint, m, n, k, k)

        def side(told: int, dim: int) -> Side | None:
            return Side("leading" if stored_columns(dim, k) == k else "free", k) if told else None

        return StaircaseRule(shape, staircase.steps, side(staircase.outputs, m), side(staircase.inputs, n))

    def derive(self, evidence: Evidence) -> Derived:
        """As many directions as asked for, or the adaptive rank."""
        settings = self.settings
        retention = settings.preserve
        if retention is None:
            cosine = 1.0 if evidence.cosine is None else evidence.cosine
            retention = adaptive_retention(cosine, *settings.retention_range)
        k = protected_count(retention, evidence.shape)
        weight = evidence.weight()
        if settings.resolved_basis == "random":
            found = random_directions(weight, self.constraint, k, f"{settings.seed} {evidence.name}")
        else:
            found = analyze_matrix(weight, self.constraint, k)
        outputs, inputs = _counts(found.output, found.input)
        return _derived(found, retention, evidence.cosine, (Added(0, outputs, inputs),))

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """Accumulates, or decomposes again."""
        rule = previous.rule
        assert isinstance(rule, StaircaseRule)
        if carry == "retake":
            first = rule.added[0]
            found = analyze_matrix(evidence.weight(), self.constraint, max(first.outputs, first.inputs))
            # Decomposed anew: no direction is any task's own any more.
            return _derived(found, rule.retention, rule.importance, rule.added[:1])
        assert evidence.update is not None
        grown = accumulate(rule, previous.tensors, evidence.update, self.constraint, evidence.task)
        return replace(grown, exact=rule.orthonormal)

    def growth(self, carry: Carry, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes by which the sides can grow with a task."""
        assert isinstance(rule, StaircaseRule)
        sides = {"output": rule.output, "input": rule.input}
        outputs, inputs = (side.directions if side is not None else 0 for side in sides.values())
        if carry == "keep":
            return 0
        free = free_directions(rule.shape, outputs, inputs, self.constraint)
        added = max(0, most_added(free)) if is_open(rule) else 0
        total = 0
        for (name, side), count, d in zip(sides.items(), (outputs, inputs), rule.shape, strict=True):
            if side is None and ((name == "output" and self.constraint == "input") or not added):
                continue
            columns = side.columns(d) if side is not None else 0
            size = sizes.get(name, 4)
            if carry == "retake":  # as many as the analysis took
                after = stored_columns(d, max(rule.added[0].outputs, rule.added[0].inputs)) * size
            else:  # what is accumulated is not rounded again
                after = most_columns(d, count, added) * max(size, 4)
            total += max(0, after - columns * size) * d
        return total


def accumulate(rule: StaircaseRule, tensors: Tensors, update: Tensor, constraint: Constraint, task: int) -> Derived:
    """Appends what a task learned to the bases of one matrix.

    Args:
        rule: that the task was trained with, `tensors` those stored with it.
        update: dW (m, n) before rounding.
        constraint: what is frozen of the directions.
        task: position of the task in the history.
    """
    m, n = rule.shape
    if not is_open(rule) or not bool(update.any()):
        return Derived(rule, tensors)
    output, input = (
        None if side is None else Basis(tensors[name].to(update.device), side.form)
        for name, side in (("output", rule.output), ("input", rule.input))
    )
    outputs, inputs = _counts(output, input)
    allowed = most_added(free_directions(rule.shape, outputs, inputs, constraint))
    if allowed <= 0:
        return Derived(replace(rule, steps=Staircase.closed(m, n).steps), tensors)
    found = singular_subspaces(update, min(allowed, m, n))
    count = min(allowed, num_leading(found.values))
    output = None if constraint == "input" else extend(output, found.left[:, :count], single_cut=True)
    input = extend(input, found.right[:, :count], single_cut=True)
    new_outputs, new_inputs = _counts(output, input)
    more = Added(task, new_outputs - outputs, new_inputs - inputs)
    added = (*rule.added, more) if more.outputs or more.inputs else rule.added
    steps = Staircase.of(constraint, m, n, new_outputs, new_inputs).steps
    grown = replace(rule, steps=steps, output=side_of(output), input=side_of(input), added=added)
    new = {name: side.vectors for name, side in (("output", output), ("input", input)) if side is not None}
    return Derived(grown, new | ({"spectrum": tensors["spectrum"]} if rule.spectrum else {}))


def _counts(output: Basis | None, input: Basis | None) -> tuple[int, int]:
    return output.directions if output else 0, input.directions if input else 0


def _derived(found: MatrixSubspaces, retention: float, importance: float | None, added: tuple[Added, ...]) -> Derived:
    staircase = found.staircase
    sides = {"output": found.output, "input": found.input}
    tensors = {name: None if side is None else side.vectors for name, side in sides.items()}
    rule = StaircaseRule(
        shape=(staircase.rows, staircase.columns),
        steps=staircase.steps,
        output=side_of(found.output),
        input=side_of(found.input),
        spectrum=found.spectrum is not None,
        retention=retention,
        importance=importance,
        energy=found.energy,
        added=added,
    )
    tensors["spectrum"] = None if found.spectrum is None else found.spectrum.to(torch.float32)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return Derived(rule, kept)


def free_directions(shape: tuple[int, int], outputs: int, inputs: int, constraint: Constraint) -> int:
    """How many directions of a matrix (m, n) are free, given those that are protected."""
    m, n = shape
    return n - inputs if constraint == "input" else min(m - outputs, n - inputs)


def most_added(free: int) -> int:
    """How many directions a task may add, given how many are free; 0 or less where the last one would go."""
    return min(max(1, int(FREE_SHARE * free)), free - 1)


def num_leading(values: Tensor) -> int:
    """The fewest leading singular values that hold 95 % of the squared norm."""
    squares = values.square()
    return int((squares.cumsum(0) < ENERGY_SHARE * squares.sum()).sum()) + 1
