"""The staircase rule: in the bases of two sides, sorted by importance, a staircase of pairs is frozen.

    dW = sum over row groups g of  Q_U[:, a:b]  A_g  Q_V[:, r:]^T

`numerics/staircase.py` has the staircase, `numerics/free_space.py` the coordinates. The sides come from weights
(`weights.py`) or from moments (`moments.py`), which also store eigenvalues: the importance of the pair (i, j) is g_i c_j.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sculptor.methods.rule import (
    Cost,
    Detail,
    Figures,
    Gradient,
    Narrowed,
    OuterProduct,
    Prepared,
    RuleStack,
    Spectrum,
    TaskShares,
    Tensors,
    Violation,
    Working,
    dense,
)
from sculptor.methods.sides import Added, Completed, Side
from sculptor.methods.staircase_stack import StaircaseStack, kinds_of
from sculptor.numerics.bases import Basis, frozen_parts, frozen_variance, protected_directions
from sculptor.numerics.free_space import (
    FreeSpace,
    Name,
    Order,
    box_origin,
    coordinate_shapes,
    hull,
    multiplications,
    narrow,
)
from sculptor.numerics.linalg import spectral_norm
from sculptor.numerics.moments import Factor, curvature, spread_profile, whole_spectrum
from sculptor.numerics.reflectors import FreeSide, free_side
from sculptor.numerics.rounding import noise_spectrum
from sculptor.numerics.staircase import Staircase
from sculptor.validation import STRICT, AtLeastOne, Count, Finite, NotNegative


@functools.lru_cache(maxsize=4096)
def _staircase(shape: tuple[int, int], steps: tuple[tuple[int, int], ...]) -> Staircase:
    """Every fold and projection asks for it, and checking it takes as long as a small product."""
    return Staircase(*shape, steps)


@dataclass(frozen=True, slots=True)
class StaircaseRule:
    """Facts of the rule of one matrix.

    Attributes:
        shape: (m, n) = (out, in).
        steps: the staircase, (stop row, reach) pairs.
        output, input: the stored sides; None where none is stored.
        moments: whether eigenvalues and the tasks' profiles are stored with each side, so that tasks can be merged in.
        spectrum: whether all singular values of W are stored.
        retention: share of directions asked for, or of pairs; `importance` is the paper's I, None without data.
        energy: what the protected part holds: of ||W||^2 at analysis, or of the curvature as it is.
        added: which task added what, in order; task 0 is the analysis.
        traces: (tr C, tr G) of every source of moments before it was scaled; `scale` the matrix's curvature against
            the mean over all.
    """

    __pydantic_config__ = STRICT
    orthonormal: ClassVar[frozenset[str]] = frozenset({"output", "input"})
    reads_weight: ClassVar[bool] = False

    shape: tuple[AtLeastOne, AtLeastOne]
    steps: Annotated[tuple[tuple[AtLeastOne, Count], ...], Field(min_length=1)]
    output: Side | None = None
    input: Side | None = None
    moments: bool = False
    spectrum: bool = False
    retention: NotNegative = 0.0
    importance: Finite | None = None
    energy: Annotated[float, Field(ge=0, le=1.001)] = 0.0
    added: tuple[Added, ...] = ()
    traces: tuple[tuple[NotNegative, NotNegative], ...] = ()
    scale: NotNegative = 1.0
    kind: Literal["staircase"] = "staircase"

    def __post_init__(self) -> None:
        staircase = self.staircase  # descends, or is an error
        for name, side, dim, told in (
            ("output", self.output, self.shape[0], staircase.outputs),
            ("input", self.input, self.shape[1], staircase.inputs),
        ):
            if side is not None and not side.directions <= dim:
                raise ValueError(f"{name}: {side.directions} directions of {dim}")
            if self.moments and side is not None and side.form != "leading":
                raise ValueError(f"{name}: directions with eigenvalues have the form leading")
            if staircase.num_free and told > (0 if side is None else side.directions):
                raise ValueError(f"steps tell {told} directions of the {name} apart, more than are stored")
            if side is not None and not self.moments and staircase.num_free and told not in (0, side.directions):
                raise ValueError(f"{name}: {side.directions} directions are stored, the steps are those of {told}")
        if self.moments and self.input is None:
            raise ValueError("moments without an input side")

    @property
    def staircase(self) -> Staircase:
        """Which pairs are frozen."""
        return _staircase(self.shape, self.steps)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of A: one matrix, or the entries of all A_g in a row; none where all is frozen."""
        return coordinate_shapes(self.staircase)

    def stored(self) -> Mapping[str, tuple[int | None, ...]]:
        """`output`, `input`; with moments their eigenvalues and profiles; all singular values."""
        found: dict[str, tuple[int | None, ...]] = {}
        for name, side, dim in self._sides():
            found[name] = (dim, side.columns(dim))
            if self.moments:
                found[f"{name}.values"] = (side.directions,)
                found[f"{name}.profiles"] = (None, None)
        return found | ({"spectrum": (min(self.shape),)} if self.spectrum else {})

    def _sides(self) -> list[tuple[str, Side, int]]:
        sides = zip(("output", "input"), (self.output, self.input), self.shape, strict=True)
        return [(name, side, dim) for name, side, dim in sides if side is not None]

    def prepare(self, tensors: Tensors, working: Working) -> Prepared:
        """Complete bases from the first free direction on; decomposed in float64 on the device, then made narrower."""
        starts = dict(zip(("output", "input"), box_origin(self.staircase), strict=True))
        found: dict[str, FreeSide | None] = {"output": None, "input": None}
        fingerprint: list[float] = []
        for name, side, _ in self._sides():
            key = (working.names.get(name, (id(tensors), name)), starts[name], working.device, working.dtype)
            if key not in working.known:
                basis = Basis(tensors[name], side.form).to(working.device, torch.float64)
                made = free_side(basis, starts[name])
                working.known[key] = made.to(dtype=working.dtype), made.fingerprint(starts[name])
            found[name], mark = working.known[key]
            fingerprint += mark
        gains = self._gains(tensors, working) if working.soften else None
        return Prepared(FreeSpace(self.staircase, found["output"], found["input"], gains).tensors(), fingerprint)

    def _gains(self, tensors: Tensors, working: Working) -> tuple[Tensor, Tensor]:
        """How much free pairs are slowed down: by 1 / sqrt(1 + soften * importance over its mean), as h_i w_j.

        Where the curvature is large, a step that is sqrt(1 + ...) times shorter does no more damage than one in a flat
        direction.
        """
        first, least = box_origin(self.staircase)
        outputs, inputs = self._importances(tensors)
        sides = working.soften * outputs[first:] / _mean(outputs), inputs[least:] / _mean(inputs)
        wide = torch.float64 if working.dtype == torch.float64 else torch.float32
        h, w = (side.to(working.device, torch.float32).to(wide) for side in sides)
        return h, w

    def _importances(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """g (m,) and c (n,), float64; 1 for outputs that are not measured."""
        g, c = self.factors(tensors)
        return torch.ones(self.shape[0], dtype=torch.float64) if g is None else g.spectrum(), c.spectrum()

    def factors(self, tensors: Tensors) -> tuple[Factor | None, Factor]:
        """The truncated moments (G or None, C)."""
        assert self.moments
        made = {name: Factor(tensors[name], tensors[f"{name}.values"], side.rest) for name, side, _ in self._sides()}
        return made.get("output"), made["input"]

    def update(self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor]) -> Tensor:
        """dW, in the dtype of the bases, or that of the coordinates where there are none."""
        return self.space(tensors).fold(list(coordinates))

    def project(
        self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor], gradient: Gradient
    ) -> tuple[Tensor, ...]:
        """Q_U[:, a:b]^T G Q_V[:, r:] of every group."""
        space = self.space(tensors)
        if isinstance(gradient, OuterProduct):
            order = self.order(gradient.inputs.shape[-2])
            if order == "both":
                return space.project_product(gradient.inputs, gradient.outputs)
            gradient = dense(gradient) if order == "after" else self.narrow(tensors, gradient, order)
        if isinstance(gradient, Narrowed):
            return space.project_narrowed(gradient.values, gradient.name)
        return space.project(gradient)

    def order(self, tokens: float) -> Order:
        """By multiplications."""
        costs = self.multiplications(tokens)
        return min(costs, key=costs.__getitem__)

    def multiplications(self, tokens: float) -> dict[Order, float]:
        """By sides as they are in training."""
        output, input = self._completed()
        return multiplications(tokens, self.shape, box_origin(self.staircase), (output.turn, input.turn))

    def narrowing(self, name: Name) -> tuple[tuple[int, int], Mapping[str, tuple[int, ...]]]:
        """Free directions of a side take the place of its directions."""
        (m, n), (first, least) = self.shape, box_origin(self.staircase)
        shape = (m, n - least) if name == "input" else (m - first, n)
        return shape, self._completed()[name == "input"].shapes

    def narrow(self, tensors: Tensors, gradient: Tensor | OuterProduct, name: Name) -> Narrowed:
        """The free directions of a side that is stored."""
        stored, dim = (self.input, self.shape[1]) if name == "input" else (self.output, self.shape[0])
        assert stored is not None
        side, first = stored.restored(name, tensors, dim), box_origin(self.staircase)[name == "input"]
        if isinstance(gradient, OuterProduct):
            return Narrowed(narrow(side, first, name, gradient.inputs, gradient.outputs), name)
        wide = gradient.to(side.dtype)
        read = side.apply_transposed(wide.mT, first).mT if name == "input" else side.apply_transposed(wide, first)
        return Narrowed(read, name)

    def stack_key(self, tensors: Tensors) -> Hashable:
        """Sides prepared alike; steps may differ."""
        forms = tuple(None if side is None else side.form for side in (self.output, self.input))
        return self.shape, forms, kinds_of(tensors)

    def stack(self, others: Sequence[Any]) -> RuleStack:
        """Whatever their steps are."""
        staircases = [rule.staircase for rule in (self, *others)]
        return StaircaseStack(staircases, replace(self, steps=hull(staircases).steps))

    def space(self, tensors: Tensors) -> FreeSpace:
        """What is free, with sides as prepared."""
        soft = (tensors["soft_outputs"], tensors["soft_inputs"]) if "soft_outputs" in tensors else None
        sides = {name: side.restored(name, tensors, dim) for name, side, dim in self._sides()}
        return FreeSpace(self.staircase, sides.get("output"), sides.get("input"), soft)

    def violation(self, tensors: Tensors, weight: Tensor, update: Tensor, variance: Tensor) -> Violation:
        """The frozen part of dW; with moments also tr(G dW C dW^T), all matrices on one scale."""
        sides = {
            name: Basis(tensors[name], side.form).to(update.device, torch.float64) for name, side, _ in self._sides()
        }
        output, input, staircase = sides.get("output"), sides.get("input"), self.staircase
        frozen = frozen_parts(update, staircase, output, input)

        def detail() -> Detail:
            peak = max((spectral_norm(part) for part in frozen), default=0.0), noise_spectrum(variance)
            if not self.moments:
                return Detail(*peak)
            g, c = self.factors(tensors)
            mean = c.trace / c.dim * (1.0 if g is None else g.trace / g.dim)
            at_random = self.scale * float(update.square().sum()) * mean
            return Detail(*peak, self.scale * curvature(update, g, c), at_random)

        norm = math.hypot(*(float(part.norm()) for part in frozen))
        rounding = frozen_variance(variance, staircase, output, input) ** 0.5
        return Violation(norm, rounding, staircase.num_frozen, detail)

    def projection(self, weight: Tensor, tensors: Tensors, soften: float = 0.0) -> Callable[[Tensor], Tensor]:
        """On the free pairs, each times 1 / (1 + soften * importance over its mean): the gain of training, twice."""
        if not self.shapes:
            return torch.zeros_like
        prepared = self.prepare(tensors, Working(weight.device, torch.float64, soften)).tensors
        return lambda update: self.update(weight, prepared, self.project(weight, prepared, (), update))

    def entry_curvature(self, tensors: Tensors) -> tuple[Tensor, Tensor] | None:
        """The diagonals of G and C."""
        if not self.moments:
            return None
        g, c = self.factors(tensors)
        return torch.ones(self.shape[0], dtype=torch.float64) if g is None else g.diagonal(), c.diagonal()

    def figures(self) -> Figures:
        """Directions protected on the side that protects most; with moments pairs, whose staircase has no one number."""
        staircase = self.staircase
        preserved = max((side.directions for _, side, _ in self._sides()), default=0) / min(self.shape)
        if staircase.num_free == 0 or self.moments:
            preserved = staircase.frozen_share
        return Figures(preserved, self.energy, {item.task: (item.outputs, item.inputs) for item in self.added})

    def cost(self, names: Mapping[str, str]) -> Cost:
        """Bases from the first free direction on, written out or as reflectors, whatever is smaller; both sides turned."""
        (m, n), starts = self.shape, box_origin(self.staircase)
        numbers: dict[str, int] = {}
        output, input = self._completed()
        for name, start, side in zip(("output", "input"), starts, (output, input), strict=True):
            if side.shapes:
                numbers[f"{names.get(name, name)} {start}"] = sum(map(math.prod, side.shapes.values()))
        first, least = starts
        turned_first = output.turn * n + input.turn * (m - first), output.turn * (n - least) + input.turn * m
        return Cost(numbers, 2.0 * min(turned_first))

    def _completed(self) -> tuple[Completed, Completed]:
        """The sides of the outputs and the inputs in training."""
        (m, n), (first, least) = self.shape, box_origin(self.staircase)
        output = self.output.completed("output", m, first) if self.output else Completed({}, 0)
        return output, self.input.completed("input", n, least) if self.input else Completed({}, 0)

    def directions(self, tensors: Tensors) -> tuple[Tensor | None, Tensor | None]:
        """The sides, as far as the staircase tells their directions apart; more may be stored."""
        counts = self.staircase.outputs, max(reach for _, reach in self.steps)
        found: dict[str, Tensor] = {}
        for name, side, _ in self._sides():
            if not self.moments:
                found[name] = protected_directions(Basis(tensors[name], side.form))
            else:
                found[name] = tensors[name][:, : counts[name == "input"]]
        return found.get("output"), found.get("input")

    def spectrum_of(self, tensors: Tensors) -> Spectrum | None:
        """Singular values of W, or eigenvalues of what it reads, as far as they are stored."""
        if self.moments:
            values = tensors["input.values"]
            return Spectrum("Input moments", values, self.shape[1], min(values.numel(), self.staircase.inputs))
        if not self.spectrum:
            return None
        dim = min(self.shape)
        return Spectrum("Singular values", tensors["spectrum"], dim, round(self.figures().preserved * dim))

    def shares(self, tensors: Tensors) -> TaskShares | None:
        """From the profiles that each task left behind: g and c are its shares per direction."""
        if not self.moments:
            return None
        m, n = self.shape
        inputs = torch.stack([spread_profile(row, n) for row in tensors["input.profiles"]])
        outputs = None
        if self.output is not None:
            outputs = torch.stack([spread_profile(row, m) for row in tensors["output.profiles"]])
        held = torch.zeros(inputs.shape[0], dtype=torch.float64)
        for start, stop, reach in self.staircase.groups:
            rows = (stop - start) / m if outputs is None else outputs[:, start:stop].sum(dim=1)
            held += rows * inputs[:, :reach].sum(dim=1)
        return TaskShares(held, _cosines(inputs) * (1.0 if outputs is None else _cosines(outputs)))

    def whole_spectrum(self, name: str, values: Tensor) -> Tensor:
        """All eigenvalues of a side, given the stored ones."""
        side, dim = (self.output, self.shape[0]) if name == "output" else (self.input, self.shape[1])
        assert side is not None
        return whole_spectrum(values, side.rest, dim)


def _mean(values: Tensor) -> float:
    return float(values.mean()) or 1.0  # a matrix that calibration never reached is not slowed down


def _cosines(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows, dim=1)
    return unit @ unit.T
