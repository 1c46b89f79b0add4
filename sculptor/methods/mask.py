"""Only the smallest entries of a matrix are trained (SaRA, arXiv 2409.06633); all others keep their bytes.

The coordinates are what is added to these entries, signs and all, so memory goes with their number. The paper's threshold is
absolute; here it is a share of each matrix, since models differ in the size of their weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sculptor.errors import ArchiveError
from sculptor.methods.method import Defaults, Derived, Evidence, Previous, Terms
from sculptor.methods.rule import Cost, Detail, Figures, Gradient, Prepared, Rule, Tensors, Violation, Working, dense
from sculptor.methods.settings import DEFAULT_FREE, AnalyzeSettings, Carry
from sculptor.methods.weights import ENERGY_SHARE, FREE_SHARE
from sculptor.numerics.masks import at_random, largest_share, num_words, pack, smallest, unpack
from sculptor.validation import STRICT, AtLeastOne, Count, NotNegative, Share

# Of the learning rate; chosen among a few on one small model (docs/rules.md).
RATE = 0.1


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Facts of the rule of one matrix.

    Attributes:
        shape: (m, n) = (out, in).
        free: how many entries may change.
        threshold: the largest magnitude that the analysis left free.
        energy: share of ||W||^2 in the entries that may not change, as the rule was made.
    """

    __pydantic_config__ = STRICT
    orthonormal: ClassVar[frozenset[str]] = frozenset()
    reads_weight: ClassVar[bool] = False

    shape: tuple[AtLeastOne, AtLeastOne]
    free: Count
    threshold: NotNegative
    energy: Share = 0.0
    kind: Literal["mask"] = "mask"

    def __post_init__(self) -> None:
        if self.free > self.num_entries:
            raise ValueError(f"{self.free} free entries of {self.num_entries}")

    @property
    def num_entries(self) -> int:
        """Of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of A: one number for each free entry."""
        return ((self.free,),) if self.free else ()

    def stored(self) -> Mapping[str, tuple[int | None, ...]]:
        """`bits`: one per entry, 1 where it is free; smaller than indices for shares above 1/32."""
        return {"bits": (num_words(self.num_entries),)}

    def mask(self, tensors: Tensors) -> Tensor:
        """What is free, (m, n) bool, on the CPU.

        Raises:
            ArchiveError: if there are not as many as the rule says.
        """
        found = unpack(tensors["bits"], self.shape)
        if int(found.sum()) != self.free:
            raise ArchiveError(
                f"a mask of {int(found.sum()):,} entries, expected {self.free:,}; run `sculptor analyze` again"
            )
        return found

    def prepare(self, tensors: Tensors, working: Working) -> Prepared:
        """Where the free entries are, in row-major order: int32 on a GPU, where that is half of what gathering takes."""
        entries = self.mask(tensors).flatten().nonzero()[:, 0]
        mark = float(torch.cos(entries.double()).sum())
        dtype = torch.int32 if working.device.type == "cuda" else torch.int64
        return Prepared({"entries": entries.to(working.device, dtype)}, [mark])

    def update(self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor]) -> Tensor:
        """A at the free entries, 0 elsewhere."""
        (a,) = coordinates
        flat = a.new_zeros(*a.shape[:-1], self.num_entries)
        return flat.scatter(-1, tensors["entries"].long(), a).view(*a.shape[:-1], *self.shape)

    def project(
        self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor], gradient: Gradient
    ) -> tuple[Tensor, ...]:
        """The gradient of the free entries."""
        chosen = dense(gradient).flatten(-2).gather(-1, tensors["entries"].long())
        return (chosen.to(torch.promote_types(chosen.dtype, torch.float32)),)

    def violation(self, tensors: Tensors, weight: Tensor, update: Tensor, variance: Tensor) -> Violation:
        """Changes of the other entries; rounding explains none, unless a cast changed them.

        Each by half a unit then, which is sqrt 3 standard deviations: none hides in what all of them explain together.
        """
        changed = (update != 0) & ~self.mask(tensors).to(update.device)
        sizes, errors = update[changed].abs(), variance[changed]
        halves = (3 * errors).sqrt()
        worst = (sizes - halves).argmax() if sizes.numel() else None
        return Violation(
            norm=float(sizes.norm()),
            rounding=float(errors.sum()) ** 0.5,
            num_pairs=self.num_entries - self.free,
            detail=lambda: Detail() if worst is None else Detail(float(sizes[worst]), float(halves[worst])),
        )

    def figures(self) -> Figures:
        """Entries that may not change, and what they hold of ||W||^2."""
        return Figures(1 - self.free / self.num_entries, self.energy, {})

    def cost(self, names: Mapping[str, str]) -> Cost:
        """Positions, each as large as two numbers of a basis on either device; one addition per entry."""
        return Cost({names.get("bits", "bits"): 2 * self.free}, 2.0 * self.free)


class Mask:
    """Frees the smallest entries of every matrix, or as many by chance: the control that any choice has to beat.

    Three ways to go on. `retake`: the smallest entries of the new weights, as many as at first; what a task made large is frozen.
    `accumulate`: what is frozen only grows, and soon nothing is left. Of the free entries those stay free that are still no
    larger than the analysis' threshold (SaRA's progressive mask), without those that the task changed most: the fewest that
    hold 95 % of ||dW||^2, at most a quarter. `keep`: the same entries.
    """

    carries: tuple[Carry, ...] = ("retake", "accumulate")
    defaults = Defaults(rate=RATE)

    def __init__(self, settings: AnalyzeSettings) -> None:
        self.settings = settings
        self.by_chance = settings.resolved_basis == "random"
        self.terms = Terms(
            basis=settings.resolved_basis,
            constraint="mask",
            share="frozen entries",
            held="energy frozen",
            note="energy frozen: of ||W||^2",
            adds=True,
        )

    def plan(self, shape: tuple[int, int]) -> Rule:
        """By the shape alone."""
        share = DEFAULT_FREE if self.settings.free is None else self.settings.free
        return MaskRule(shape, max(1, round(share * shape[0] * shape[1])), 0.0)

    def derive(self, evidence: Evidence) -> Derived:
        """The smallest entries."""
        return self._taken(evidence)

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """Frees fewer, or takes the smallest again."""
        if carry == "retake":
            return self._taken(evidence)
        rule = previous.rule
        assert isinstance(rule, MaskRule)
        assert evidence.update is not None
        weight = evidence.weight()
        mask = rule.mask(previous.tensors).to(weight.device)
        used = largest_share(evidence.update.to(weight.device)[mask], ENERGY_SHARE, int(FREE_SHARE * rule.free))
        small = torch.ones_like(used) if self.by_chance else weight[mask].abs() <= rule.threshold
        left = torch.zeros_like(mask)
        left[mask] = small & ~used
        return _derived(rule, weight, left)

    def _taken(self, evidence: Evidence) -> Derived:
        planned, weight = self.plan(evidence.shape), evidence.weight()
        assert isinstance(planned, MaskRule)
        mask, threshold = smallest(weight, planned.free)
        if self.by_chance:
            mask = at_random(evidence.shape, planned.free, f"{self.settings.seed} {evidence.name} {evidence.task}")
            mask = mask.to(weight.device)
        return _derived(replace(planned, threshold=threshold), weight, mask)


def _derived(rule: MaskRule, weight: Tensor, mask: Tensor) -> Derived:
    total = float(weight.square().sum())
    energy = float(weight[~mask].square().sum()) / total if total else 1.0
    return Derived(replace(rule, free=int(mask.sum()), energy=min(1.0, energy)), {"bits": pack(mask)})
