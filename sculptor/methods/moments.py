"""Protected pairs from what earlier data use: second moments of a matrix's inputs, and of the gradients of its outputs.

Moments of several sources are of unit trace, weighted and summed (`Evidence`); they are decomposed and truncated here,
and added to what an archive holds of earlier tasks. The staircases follow when all eigenvalues are known, since one
threshold may serve the whole model. Curvature of a change dW: tr(G dW C dW^T); without G, tr(dW C dW^T).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sculptor.methods.method import Defaults, Derived, Evidence, Measures, Moment, Previous, Step, Terms
from sculptor.methods.rule import Rule, Tensors
from sculptor.methods.settings import AnalyzeSettings, Carry
from sculptor.methods.sides import Added, Side
from sculptor.methods.staircase import StaircaseRule
from sculptor.numerics.allocation import Importance, allocate, least_free_share
from sculptor.numerics.moments import Factor, profile, rotate_profile, truncate
from sculptor.numerics.staircase import Staircase
from sculptor.numerics.transfer import moved

# Of the learning rate; measured for curvature on three models (docs/benchmarks.md), at which inputs are set too.
RATE = 0.2


@dataclass(frozen=True, eq=False, slots=True)
class _MeasuredSide:
    """One side of a matrix: its truncated moment, and each task's profile in it (tasks, 65)."""

    factor: Factor
    profiles: Tensor


class Moments:
    """Freezes the pairs above a threshold of importance: by inputs alone, or by inputs and gradients (curvature).

    `merge` adds the moments of a finished task to those of the archive.
    """

    carries: tuple[Carry, ...] = ("merge",)

    def __init__(self, settings: AnalyzeSettings) -> None:
        self.settings = settings
        self.gradients = settings.resolved_basis == "curvature"
        what = "curvature" if self.gradients else "inputs"
        self.terms = Terms(
            basis=settings.resolved_basis,
            constraint="staircase" if self.gradients else "input",
            share="frozen pairs",
            held=f"{what} frozen",
            note="curvature frozen: what these pairs have of it" if self.gradients else "inputs frozen: of E||x||^2",
            adds=True,
            budget=settings.free_budget,
        )
        self.defaults = Defaults(RATE, 3.0 if self.gradients else 0.0, memory_weight=1.0)
        # An input that several matrices read is decomposed once; forgotten with the moment itself.
        self._known: WeakKeyDictionary[Moment, _MeasuredSide] = WeakKeyDictionary()

    def check(self, shapes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """What does not go with moments, is missing, or cannot be had of what is stored of matrices of some shapes."""
        settings = self.settings
        basis = f"with --basis {settings.resolved_basis}"
        idle = settings.given("constraint", "preserve", "min_retention", "target_retention")
        wrong = [f"{', '.join(idle)} without effect {basis}: use --budget"] if idle else []
        if not self.gradients:
            idle = settings.given("fisher", "row_groups") + (
                ["--weighting"] if settings.weighting == "gradients" else []
            )
            if idle:
                wrong.append(f"{', '.join(idle)} without effect {basis}: for curvature only")
        least = max((self._least_budget(shape) for shape in shapes), default=0.0)
        if settings.free_budget < least - 1e-9:
            wrong.append(
                f"--budget {settings.free_budget}: with --keep {settings.keep}, a share of {least:.3f} stays free at least; "
                "keep more or free more"
            )
        return wrong

    def _least_budget(self, shape: tuple[int, int]) -> float:
        one, (m, n), keep = torch.ones(1), shape, self.settings.keep
        outputs = one.expand(m) if self.gradients else None
        stored = kept_directions(m, keep), kept_directions(n, keep)
        return least_free_share([Importance(m, outputs, one.expand(n), *stored)], self.settings.row_groups)

    def measures(self, step: Step, carry: Carry | None = None) -> Measures:
        """Moments, of the analysis' rows and of every finished task's that is merged."""
        if step == "open":
            return "nothing"
        return "gradients" if self.gradients else "inputs"

    def plan(self, shape: tuple[int, int]) -> Rule:
        """By the shape alone, as if every matrix had the budget's share of free pairs, and importance fell as 1/i on both sides."""
        (m, n), settings = shape, self.settings
        stored = kept_directions(m, settings.keep), kept_directions(n, settings.keep)
        outputs, inputs = (1 / torch.arange(1, dim + 1, dtype=torch.float64) for dim in shape)
        importance = Importance(m, outputs if self.gradients else None, inputs, *stored)
        (stairs,) = allocate([importance], settings.free_budget, settings.row_groups)
        sides = [Side("leading", count) for count in stored]
        return StaircaseRule(
            shape, stairs.steps, output=sides[0] if self.gradients else None, input=sides[1], moments=True
        )

    def derive(self, evidence: Evidence) -> Derived:
        """Everything frozen for now: `decide` finds the staircase."""
        return self._merged(evidence, None)

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """Adds the task's moments."""
        return self._merged(evidence, previous)

    def _merged(self, evidence: Evidence, previous: Previous | None) -> Derived:
        old = previous.rule if previous is not None else None
        assert old is None or isinstance(old, StaircaseRule)
        shared = frozenset({"input", "input.values", "input.profiles"})
        if evidence.inputs is None:  # no row of the task reaches it: what it held goes on
            assert old is not None
            assert previous is not None
            return Derived(replace(old, traces=(*old.traces, *evidence.traces)), dict(previous.tensors), shared)
        tensors: dict[str, Tensor] = {}
        sides: dict[str, Side] = {}
        for name, moment in (("output", evidence.outputs), ("input", evidence.inputs)):
            if moment is None:
                continue
            if moment not in self._known:
                held = None if old is None or previous is None else self._factor(name, old, previous.tensors)
                self._known[moment] = self._measure(moment.value, held)
            found = self._known[moment]
            count = found.factor.values.numel()
            sides[name] = Side("leading", count, found.factor.rest)
            tensors[name] = found.factor.vectors
            tensors[f"{name}.values"] = found.factor.values
            tensors[f"{name}.profiles"] = found.profiles
        counts = [side.directions if side is not None else 0 for side in (sides.get("output"), sides["input"])]
        rule = StaircaseRule(
            shape=evidence.shape,
            steps=Staircase.closed(*evidence.shape).steps,
            output=sides.get("output"),
            input=sides["input"],
            moments=True,
            retention=1 - self.settings.free_budget,
            added=(Added(0, *counts),),
            traces=(*(old.traces if old is not None else ()), *evidence.traces),
        )
        return Derived(rule, tensors, shared)

    def _factor(self, name: str, rule: StaircaseRule, tensors: Tensors) -> tuple[Factor, Tensor] | None:
        """What an archive holds of a side."""
        side = rule.output if name == "output" else rule.input
        if side is None:
            return None
        return Factor(tensors[name], tensors[f"{name}.values"], side.rest), tensors[f"{name}.profiles"]

    def _measure(self, moment: Tensor, held: tuple[Factor, Tensor] | None) -> _MeasuredSide:
        """One moment, with what an earlier archive holds of it, as it will be stored."""
        k = kept_directions(moment.shape[0], self.settings.keep)
        if held is None:
            factor = truncate(moment, k)
            return _MeasuredSide(self._stored(factor), profile(moment, factor.vectors)[None].float().cpu())
        old, profiles = held
        old_vectors = old.vectors.to(moment.device)
        factor = truncate(moment + old.dense(moment.device).to(moment.dtype), k)
        carried = [rotate_profile(row.to(moment.device), old_vectors, factor.vectors) for row in profiles]
        stacked = torch.stack([*carried, profile(moment, factor.vectors)])
        return _MeasuredSide(self._stored(factor), stacked.float().cpu())

    def _stored(self, factor: Factor) -> Factor:
        """On the CPU, in the dtype of the archive: shared inputs wait for all their readers."""
        dtype = getattr(torch, self.settings.dtype)
        return Factor(moved(factor.vectors, "cpu", dtype), factor.values.cpu(), factor.rest)

    def decide(
        self, rules: Sequence[Rule], weights: Sequence[float], read: Callable[[int, str], Tensor]
    ) -> Sequence[Rule]:
        """Staircases under the budget, of one threshold or of one per matrix, and the share of curvature they protect.

        Raises:
            ValueError: if the stored directions cannot freeze as much as the budget asks for.
        """
        known = [rule for rule in rules if isinstance(rule, StaircaseRule)]
        assert len(known) == len(rules)
        settings = self.settings
        scales = curvature_scales([(rule.traces, rule.output is not None) for rule in known], weights)
        found = [
            self._importance(rule, partial(read, i), scale)
            for i, (rule, scale) in enumerate(zip(known, scales, strict=True))
        ]
        budget, groups = settings.free_budget, settings.row_groups
        if self.gradients if settings.threshold is None else settings.threshold == "model":
            staircases = allocate(found, budget, groups)
        else:
            staircases = [allocate([importance], budget, groups)[0] for importance in found]
        return [
            replace(rule, steps=stairs.steps, energy=importance.protected_share(stairs), scale=importance.scale)
            for rule, importance, stairs in zip(known, found, staircases, strict=True)
        ]

    def _importance(self, rule: StaircaseRule, read: Callable[[str], Tensor], scale: float) -> Importance:
        assert rule.input is not None
        outputs = None if rule.output is None else rule.whole_spectrum("output", read("output.values"))
        stored = 0 if rule.output is None else rule.output.directions
        inputs = rule.whole_spectrum("input", read("input.values"))
        return Importance(rule.shape[0], outputs, inputs, stored, rule.input.directions, scale)


def kept_directions(dim: int, keep: float) -> int:
    """How many leading directions of a side are stored."""
    return max(1, min(dim, round(keep * dim)))


def curvature_scales(
    traces: Sequence[tuple[Sequence[tuple[float, float]], bool]], weights: Sequence[float]
) -> list[float]:
    """Curvature of every matrix against the mean over all, added up over sources with their weights.

    Args:
        traces: of every matrix (tr C, tr G) by source, and whether its G was measured.
        weights: of the sources.
    """
    totals = [0.0] * len(traces)
    for i, weight in enumerate(weights):
        sizes = [found[i][0] * found[i][1] if measured else found[i][0] for found, measured in traces]
        mean = sum(sizes) / len(sizes) or 1.0
        totals = [total + weight * size / mean for total, size in zip(totals, sizes, strict=True)]
    return [total or 1.0 for total in totals]
