"""Outputs of a matrix are only rotated among each other (OrthSR, arXiv 2407.08374): W' = R W, so that W'^T W' = W^T W.

R is block-diagonal, each block a rotation by Cayley's map (`numerics/rotations.py`). With protected output directions U, and F
(m, p) completing them, R = I + F (R' - I) F^T turns only what is free: U^T W' = U^T W as well. The coordinates are the
entries above the diagonal of the skew matrices: angles, in no unit of W.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sculptor.methods.method import Defaults, Derived, Evidence, Previous, Terms
from sculptor.methods.ranks import protected_count
from sculptor.methods.rule import (
    Cost,
    Detail,
    Figures,
    Gradient,
    Prepared,
    Rule,
    Spectrum,
    TaskShares,
    Tensors,
    Violation,
    Working,
    dense,
    is_open,
)
from sculptor.methods.settings import DEFAULT_BLOCK, AnalyzeSettings, Carry
from sculptor.methods.sides import Added, Side, side_of
from sculptor.methods.weights import analyze_matrix, most_added, num_leading, random_directions
from sculptor.numerics.bases import Basis, extend, most_columns, protected_directions, stored_columns
from sculptor.numerics.linalg import singular_subspaces, spectral_norm
from sculptor.numerics.reflectors import FreeSide, free_side, named_tensors
from sculptor.numerics.rotations import angle_shapes, blocks_of, num_turns, turn, turn_gradient, unexplained_turn
from sculptor.numerics.rounding import noise_spectrum
from sculptor.numerics.staircase import Constraint
from sculptor.validation import STRICT, AtLeastOne

# Of the learning rate, in the units of other rules: a step turns a matrix by as much of its norm; chosen among a few
# on one small model.

# (docs/rules.md).
RATE = 0.1
_CONSTRAINT: Constraint = "double"


@dataclass(frozen=True, slots=True)
class RotationRule:
    """Facts of the rule of one matrix.

    Attributes:
        shape: (m, n) = (out, in).
        size: of the blocks of free output directions that are turned together.
        output: the stored side of outputs, if some are protected.
        energy: share of ||W||^2 in the protected outputs at analysis.
        added: which task protected how many, in order; task 0 is the analysis.
    """

    __pydantic_config__ = STRICT
    orthonormal: ClassVar[frozenset[str]] = frozenset({"output"})
    reads_weight: ClassVar[bool] = True

    shape: tuple[AtLeastOne, AtLeastOne]
    size: Annotated[int, Field(ge=2, le=2**31)]
    output: Side | None = None
    energy: Annotated[float, Field(ge=0, le=1.001)] = 0.0
    added: tuple[Added, ...] = ()
    kind: Literal["rotation"] = "rotation"

    def __post_init__(self) -> None:
        if self.output is not None and self.output.directions > self.shape[0]:
            raise ValueError(f"output: {self.output.directions} directions of {self.shape[0]}")

    @property
    def protected(self) -> int:
        """How many outputs are protected."""
        return 0 if self.output is None else self.output.directions

    @property
    def turned(self) -> int:
        """How many output directions are turned."""
        return self.shape[0] - self.protected

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of A: for blocks of one size (blocks, entries above the diagonal)."""
        return angle_shapes(self.turned, self.size)

    def stored(self) -> Mapping[str, tuple[int | None, ...]]:
        """`output`, where some are protected."""
        m = self.shape[0]
        return {} if self.output is None else {"output": (m, self.output.columns(m))}

    def prepare(self, tensors: Tensors, working: Working) -> Prepared:
        """The free output directions, completed in float64."""
        if self.output is None:
            return Prepared({}, [])
        made = self._completed(tensors, working.device)
        mark = made.fingerprint(self.protected)
        return Prepared(named_tensors("output", made.to(dtype=working.dtype)), mark)

    def _completed(self, tensors: Tensors, device: torch.device) -> FreeSide:
        assert self.output is not None
        return free_side(Basis(tensors["output"], self.output.form).to(device, torch.float64), self.protected)

    def _side(self, tensors: Tensors) -> FreeSide | None:
        return None if self.output is None else self.output.restored("output", tensors, self.shape[0])

    def _read(self, x: Tensor, side: FreeSide | None) -> Tensor:
        """F^T x, (p, n)."""
        return x if side is None else side.apply_transposed(x.to(side.dtype), self.protected)

    def _write(self, x: Tensor, side: FreeSide | None) -> Tensor:
        """F x, (m, n)."""
        return x if side is None else side.apply(x.to(side.dtype), self.protected)

    def update(self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor]) -> Tensor:
        """F (R' - I) F^T W."""
        side = self._side(tensors)
        return self._write(turn(self._read(weight, side), coordinates, self.size), side)

    def project(
        self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor], gradient: Gradient
    ) -> tuple[Tensor, ...]:
        """Of the angles, in their dtype."""
        side = self._side(tensors)
        read, given = self._read(weight, side), self._read(dense(gradient), side)
        return turn_gradient(read, coordinates, self.size, given)

    def violation(self, tensors: Tensors, weight: Tensor, update: Tensor, variance: Tensor) -> Violation:
        """What of dW is in the protected outputs, and of the rest what no rotation of its blocks explains."""
        m, n = self.shape
        side = None if self.output is None else self._completed(tensors, update.device)
        before, change = self._read(weight, side), self._read(update, side)
        off = self._write(unexplained_turn(before, before + change, self.size) - change, side) + update
        unexplained = m * n - num_turns(self.turned, n, self.size)
        return Violation(
            norm=float(off.norm()),
            rounding=math.sqrt(float(variance.sum()) * unexplained / (m * n)),
            num_pairs=unexplained,
            detail=lambda: Detail(spectral_norm(off), noise_spectrum(variance)),
        )

    def figures(self) -> Figures:
        """The share of outputs that are protected, and what they hold."""
        return Figures(
            self.protected / self.shape[0] if is_open(self) else 1.0,
            self.energy,
            {item.task: (item.outputs, item.inputs) for item in self.added},
        )

    def cost(self, names: Mapping[str, str]) -> Cost:
        """The free directions, written out or as reflectors; turned there and back."""
        (m, n), numbers, turns = self.shape, {}, 0
        if self.output is not None:
            c, free = self.output.columns(m), self.turned
            numbers[names.get("output", "output")] = m * free if free <= c else m * c + c * c
            turns = 2 * (m * free if free <= c else c * (2 * m + c - self.protected))
        blocks = sum(count * side * side for count, side in blocks_of(self.turned, self.size))
        return Cost(numbers, 2.0 * n * (turns + blocks))

    def directions(self, tensors: Tensors) -> tuple[Tensor | None, Tensor | None]:
        """Protected outputs (m, k)."""
        if self.output is None:
            return None, None
        return protected_directions(Basis(tensors["output"], self.output.form)), None

    def spectrum_of(self, tensors: Tensors) -> Spectrum | None:
        """None is stored."""
        return None

    def shares(self, tensors: Tensors) -> TaskShares | None:
        """Not known."""
        return None


class Rotation:
    """Turns the outputs of every matrix, all of them or what is free of its leading singular directions (or random ones).

    Two ways to go on. `keep` (OrthSR): the next task turns the same directions. `accumulate`: the outputs that the task moved
    most are protected, too: the fewest left singular vectors of dW that hold 95 % of ||dW||^2, at most a quarter of what
    is free.
    """

    carries: tuple[Carry, ...] = ("keep", "accumulate")

    def __init__(self, settings: AnalyzeSettings) -> None:
        self.settings = settings
        self.size = settings.block_size or DEFAULT_BLOCK
        # A block of s turns each of its rows by s - 1 angles at once, each twice its entry of Q.
        self.defaults = Defaults(rate=RATE / (2 * math.sqrt(self.size - 1)), scaled=False)
        self.terms = Terms(
            basis=settings.resolved_basis,
            constraint="rotation",
            share="outputs kept",
            held="energy kept",
            note="energy kept: of ||W||^2, in outputs kept",
            adds=False,
        )

    def check(self, shapes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """What has no effect."""
        settings = self.settings
        if settings.preserve == 1:
            return ["--preserve 1: no direction would be left to train; use less than 1"]
        if settings.preserve:
            return []
        idle = (["--basis random"] if settings.basis == "random" else []) + settings.given("dtype")
        return [f"{', '.join(idle)} without effect with --rule rotation: --preserve protects no output"] if idle else []

    def plan(self, shape: tuple[int, int]) -> Rule:
        """By the shape alone."""
        m, k = shape[0], protected_count(self.settings.preserve or 0.0, shape)
        side = Side("leading" if stored_columns(m, k) == k else "free", k)
        return RotationRule(shape, self.size, side if k else None)

    def derive(self, evidence: Evidence) -> Derived:
        """Leading or random output directions, as many as asked for."""
        k = protected_count(self.settings.preserve or 0.0, evidence.shape)
        if not k:
            return _derived(RotationRule(evidence.shape, self.size), None)
        if self.settings.resolved_basis == "random":
            seed = f"{self.settings.seed} {evidence.name}"
            found = random_directions(evidence.weight(), _CONSTRAINT, k, seed)
        else:
            found = analyze_matrix(evidence.weight(), _CONSTRAINT, k)
        rule = RotationRule(evidence.shape, self.size, energy=found.energy, added=(Added(0, k, 0),))
        return _derived(rule, found.output)

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """Protects what the task moved most."""
        rule, update = previous.rule, evidence.update
        assert isinstance(rule, RotationRule)
        assert update is not None
        output = None
        if rule.output is not None:
            output = Basis(previous.tensors["output"].to(update.device), rule.output.form)
        allowed = min(most_added(rule.turned), *rule.shape)
        if not is_open(rule) or allowed <= 0 or not bool(update.any()):
            return Derived(rule, previous.tensors, exact=rule.orthonormal)
        found = singular_subspaces(update, allowed)
        grown = extend(output, found.left[:, : min(allowed, num_leading(found.values))], single_cut=True)
        assert grown is not None
        more = Added(evidence.task, grown.directions - rule.protected, 0)
        return _derived(replace(rule, added=(*rule.added, more)), grown)

    def growth(self, carry: Carry, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes by which the side can grow with a task."""
        assert isinstance(rule, RotationRule)
        if carry == "keep":
            return 0
        m, before = rule.shape[0], 0 if rule.output is None else rule.output.columns(rule.shape[0])
        size = sizes.get("output", 4)
        columns = most_columns(m, rule.protected, max(0, most_added(rule.turned)))
        return max(0, columns * max(size, 4) - before * size) * m


def _derived(rule: RotationRule, output: Basis | None) -> Derived:
    tensors = {} if output is None else {"output": output.vectors}
    return Derived(
        replace(rule, output=side_of(output)), tensors, exact=rule.orthonormal if rule.added[1:] else frozenset()
    )
