"""CrispEdit's constraint (arXiv 2602.15823), to compare with: a K-FAC mask, by which gradients are projected before AdamW.

With U, V the eigenvectors of the moments of output gradients and inputs and g, c their eigenvalues, the pair (i, j) has
the curvature g_i c_j. The pairs below one threshold are free, and a gradient G becomes

    U (M * (U^T G V)) V^T        M_ij = 1 where g_i c_j <= threshold, else 0

AdamW scales this entry by entry in the coordinates of W, so the update does leave the free pairs: `violation` tells how far.
Moments, their budget (`[analyze] budget`, over all matrices) and how they go on are those of `curvature`; the mask is exact,
in the place of a staircase.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sculptor.methods.kinds import Kind
from sculptor.methods.method import Defaults, Derived, Evidence, Measures, Previous, Step, Terms
from sculptor.methods.moments import RATE, Moments, curvature_scales
from sculptor.methods.rule import Figures, Gradient, Prepared, Rule, Tensors, Violation, Working, dense
from sculptor.methods.settings import AnalyzeSettings, Carry
from sculptor.methods.staircase import StaircaseRule
from sculptor.validation import STRICT, AtLeastOne, NotNegative, Share

NAME = "crispedit"


@dataclass(frozen=True, slots=True)
class CrispRule:
    """Facts of one matrix: its factors, all directions of them, and the threshold; `free` and `held` of its pairs."""

    __pydantic_config__ = STRICT
    orthonormal: ClassVar[frozenset[str]] = frozenset({"output", "input"})
    reads_weight: ClassVar[bool] = False

    shape: tuple[AtLeastOne, AtLeastOne]
    factors: StaircaseRule
    threshold: NotNegative = 0.0
    free: Share = 0.0
    held: NotNegative = 0.0
    kind: Literal["crispedit"] = "crispedit"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """W itself."""
        return (self.shape,)

    def stored(self) -> Mapping[str, tuple[int | None, ...]]:
        """Those of the factors."""
        return self.factors.stored()

    def prepare(self, tensors: Tensors, working: Working) -> Prepared:
        """Bases, and the mask."""
        found = {name: tensors[name].to(working.device, working.dtype) for name in ("output", "input")}
        mask = self.mask(tensors)
        found["mask"] = mask.to(working.device, working.dtype)
        return Prepared(
            found, [float(mask.sum()), *(float(tensors[n].double().diagonal().sum()) for n in found if n != "mask")]
        )

    def mask(self, tensors: Tensors) -> Tensor:
        """M (m, n), float64."""
        g, c = (self.factors.whole_spectrum(name, tensors[f"{name}.values"]).double() for name in ("output", "input"))
        return (self.factors.scale * torch.outer(g, c) <= self.threshold).double()

    def update(self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor]) -> Tensor:
        """A as it is."""
        return coordinates[0]

    def project(
        self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor], gradient: Gradient
    ) -> tuple[Tensor, ...]:
        """U (M * (U^T G V)) V^T."""
        u, v, mask = tensors["output"], tensors["input"], tensors["mask"]
        turned = u.mT @ dense(gradient).to(u.dtype) @ v
        return ((u @ (mask * turned) @ v.mT).contiguous(),)

    def violation(self, tensors: Tensors, weight: Tensor, update: Tensor, variance: Tensor) -> Violation:
        """What lies in masked pairs."""
        u, v = (tensors[name].to(update.device, torch.float64) for name in ("output", "input"))
        masked = 1 - self.mask(tensors).to(update.device)
        error = float((masked * (u.square().mT @ variance @ v.square())).sum()) ** 0.5
        return Violation(float((masked * (u.mT @ update @ v)).norm()), error, int(masked.sum()))

    def figures(self) -> Figures:
        """Pairs that are masked, and what they have of the curvature."""
        return Figures(1 - self.free, self.held, {})


@dataclass(frozen=True, eq=False, slots=True)
class _Held:
    rule: Rule
    tensors: Tensors


class CrispEdit:
    """Makes the masks; moments are measured, decomposed and carried on by `Moments`, with all directions kept."""

    carries: tuple[Carry, ...] = ("merge",)

    def __init__(self, settings: AnalyzeSettings) -> None:
        self.settings = settings
        self._moments = Moments(replace(settings, rule="staircase", basis="curvature", keep=1.0))
        note = "curvature masked: what these pairs have of it"
        self.terms = Terms(NAME, "K-FAC mask", "masked pairs", "curvature masked", note, True, settings.free_budget)
        self.defaults = Defaults(RATE, memory_weight=1.0)

    def check(self, shapes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """As for `curvature`."""
        return self._moments.check(shapes)

    def measures(self, step: Step, carry: Carry | None = None) -> Measures:
        """As for `curvature`."""
        return self._moments.measures(step, carry)

    def derive(self, evidence: Evidence) -> Derived:
        """Everything masked for now: `decide` finds the threshold."""
        return _wrapped(self._moments.derive(evidence))

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """Adds the task's moments."""
        assert isinstance(previous.rule, CrispRule)
        return _wrapped(self._moments.carry(carry, _Held(previous.rule.factors, previous.tensors), evidence))

    def decide(
        self, rules: Sequence[Rule], weights: Sequence[float], read: Callable[[int, str], Tensor]
    ) -> Sequence[Rule]:
        """One threshold for all matrices, which leaves the budget free."""
        known = [rule for rule in rules if isinstance(rule, CrispRule)]
        assert len(known) == len(rules)
        scales = curvature_scales([(rule.factors.traces, True) for rule in known], weights)
        values = []
        for i, (rule, scale) in enumerate(zip(known, scales, strict=True)):
            g, c = (rule.factors.whole_spectrum(name, read(i, f"{name}.values")) for name in ("output", "input"))
            values.append((scale * g.double(), c.double().sort().values))
        threshold = lowest_threshold(values, self.settings.free_budget)
        found = []
        for rule, scale, (g, c) in zip(known, scales, values, strict=True):
            free, held = num_below(g, c, threshold) / (g.numel() * c.numel()), masked_share(g, c, threshold)
            factors = replace(rule.factors, scale=scale)
            found.append(replace(rule, factors=factors, threshold=threshold, free=free, held=held))
        return found


def num_below(g: Tensor, c: Tensor, threshold: float) -> int:
    """How many pairs of g (m,) and ascending c (n,) are at most a threshold."""
    return int(torch.searchsorted(c, threshold / g, right=True).sum())


def masked_share(g: Tensor, c: Tensor, threshold: float) -> float:
    """Share of sum(g) sum(c) in pairs above a threshold; c ascending."""
    sums = torch.cat([c.new_zeros(1), c.cumsum(0)])
    below = float((g * sums[torch.searchsorted(c, threshold / g, right=True)]).sum())
    total = float(g.sum() * c.sum())
    return max(0.0, 1 - below / total) if total > 0 else 0.0


def lowest_threshold(values: Sequence[tuple[Tensor, Tensor]], budget: float) -> float:
    """The lowest threshold, to 1e-12 of itself, that leaves a share of all pairs free; c ascending."""
    pairs = sum(g.numel() * c.numel() for g, c in values)

    def free(threshold: float) -> float:
        return sum(num_below(g, c, threshold) for g, c in values) / pairs

    high = max(float(g.max() * c[-1]) for g, c in values) * (1 + 1e-9)
    low = high * 1e-30
    for _ in range(200):
        middle = (low * high) ** 0.5  # over many orders of magnitude
        low, high = (low, middle) if free(middle) >= budget else (middle, high)
        if high <= low * (1 + 1e-12):
            break
    return high


def _wrapped(derived: Derived) -> Derived:
    assert isinstance(derived.rule, StaircaseRule)
    return replace(derived, rule=CrispRule(derived.rule.shape, derived.rule))


KIND = Kind(CrispRule, CrispEdit)
