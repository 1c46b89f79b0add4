"""A matrix may only change along a few directions of its inputs, free of a memory (InfLoRA, arXiv 2404.00228).

dW = B A^T with A (n, r) fixed and orthogonal to the memory M (n, k): dW m = 0 for every m in it. A are the directions that the
new task's inputs use most of what M leaves free, measured before its first step; B (m, r) is trained, and merged. The paper's
A has its rows divided by sqrt 3, as LoRA starts them; here they are of length 1, and the learning rate says the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sculptor.errors import ArchiveError
from sculptor.methods.method import Defaults, Derived, Evidence, Measures, Moment, Previous, Step, Terms
from sculptor.methods.rule import (
    Cost,
    Detail,
    Figures,
    Gradient,
    Narrowed,
    OuterProduct,
    Prepared,
    Rule,
    Spectrum,
    TaskShares,
    Tensors,
    Violation,
    Working,
)
from sculptor.methods.settings import DEFAULT_ENERGY, DEFAULT_RANK, AnalyzeSettings, Carry
from sculptor.methods.sides import Added, Side, side_of
from sculptor.numerics.bases import Basis, leverage, most_columns, protected_directions
from sculptor.numerics.chance import generator_of
from sculptor.numerics.free_space import Name, Order
from sculptor.numerics.linalg import spectral_norm
from sculptor.numerics.memory import grow, leading_free, random_free, without
from sculptor.numerics.reflectors import Columns
from sculptor.numerics.rounding import noise_spectrum
from sculptor.validation import STRICT, AtLeastOne, Count, Share

# Of the learning rate; chosen among a few on one small model (docs/rules.md).
RATE = 0.05


@dataclass(frozen=True, slots=True)
class LowRankRule:
    """Facts of the rule of one matrix.

    Attributes:
        shape: (m, n) = (out, in).
        rank: r, how many directions of the inputs a task may use.
        memory: the stored side of protected inputs, if there are some.
        opened: whether the directions are chosen and stored; else they follow the next task's rows.
        energy: share of E||x||^2 in the memory, of the rows that were measured last.
        added: which task protected how many, in order; task 0 is the analysis.
    """

    __pydantic_config__ = STRICT
    orthonormal: ClassVar[frozenset[str]] = frozenset({"memory", "directions"})
    reads_weight: ClassVar[bool] = False

    shape: tuple[AtLeastOne, AtLeastOne]
    rank: Count
    memory: Side | None = None
    opened: bool = False
    energy: Share = 0.0
    added: tuple[Added, ...] = ()
    kind: Literal["lowrank"] = "lowrank"

    def __post_init__(self) -> None:
        if self.rank + self.protected > self.shape[1]:
            raise ValueError(f"{self.rank} directions and {self.protected} protected ones of {self.shape[1]} inputs")

    @property
    def protected(self) -> int:
        """How many inputs are."""
        return 0 if self.memory is None else self.memory.directions

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of B."""
        return ((self.shape[0], self.rank),) if self.rank else ()

    def stored(self) -> Mapping[str, tuple[int | None, ...]]:
        """`memory`, where there is one; `directions`, where they are chosen."""
        n = self.shape[1]
        found: dict[str, tuple[int | None, ...]] = {}
        if self.memory is not None:
            found["memory"] = (n, self.memory.columns(n))
        return found | ({"directions": (n, self.rank)} if self.opened else {})

    def _memory(self, tensors: Tensors, device: torch.device) -> Basis | None:
        return None if self.memory is None else Basis(tensors["memory"], self.memory.form).to(device, torch.float64)

    def _directions(self, tensors: Tensors, device: torch.device) -> Tensor:
        """A (n, r), float64: orthogonal to the memory, however both were rounded when they were stored."""
        return without(self._memory(tensors, device), tensors["directions"].to(device))

    def prepare(self, tensors: Tensors, working: Working) -> Prepared:
        """A.

        Raises:
            ArchiveError: if no directions are chosen.
        """
        if not self.opened:
            raise ArchiveError(
                "directions follow a task's rows with --rule lowrank: `sculptor train` chooses them, and leaves them in "
                "opened/ of its output; or analyze with --basis random"
            )
        key = (*(working.names.get(name, (id(tensors), name)) for name in self.stored()), working.device, working.dtype)
        if key not in working.known:
            made = Columns(self._directions(tensors, working.device))
            columns = made.columns.to(working.dtype).contiguous()  # products tell the order in memory in the last bit
            working.known[key] = columns, made.fingerprint(self.shape[1] - self.rank)
        columns, mark = working.known[key]
        return Prepared({"directions": columns}, mark)

    def update(self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor]) -> Tensor:
        """B A^T."""
        directions = tensors["directions"]
        return coordinates[0].to(directions.dtype) @ directions.mT

    def project(
        self, weight: Tensor, tensors: Tensors, coordinates: Sequence[Tensor], gradient: Gradient
    ) -> tuple[Tensor, ...]:
        """G A."""
        read = gradient if isinstance(gradient, Narrowed) else self.narrow(tensors, gradient, "input")
        return (read.values.to(torch.promote_types(read.values.dtype, torch.float32)).contiguous(),)

    def order(self, tokens: float) -> Order:
        """There are always fewer directions than inputs."""
        return "input"

    def multiplications(self, tokens: float) -> dict[Order, float]:
        """Of X A and dY^T (X A)."""
        return {"input": tokens * sum(self.shape) * self.rank}

    def narrowing(self, name: Name) -> tuple[tuple[int, int], Mapping[str, tuple[int, ...]]]:
        """A is all that it takes."""
        return (self.shape[0], self.rank), {"directions": (self.shape[1], self.rank)}

    def narrow(self, tensors: Tensors, gradient: Tensor | OuterProduct, name: Name) -> Narrowed:
        """G A."""
        directions = tensors["directions"]
        if isinstance(gradient, OuterProduct):
            read = gradient.inputs.to(directions.dtype) @ directions
            return Narrowed(gradient.outputs.mT.to(directions.dtype) @ read, name)
        return Narrowed(gradient.to(directions.dtype) @ directions, name)

    def violation(self, tensors: Tensors, weight: Tensor, update: Tensor, variance: Tensor) -> Violation:
        """dW outside of the directions; where these are not known, dW along the memory."""
        m, n = self.shape
        if self.opened:
            directions = self._directions(tensors, update.device)
            off = update - (update @ directions) @ directions.T
            axes, count = 1 - directions.square().sum(dim=1), n - self.rank
        else:
            memory = self._memory(tensors, update.device)
            if memory is None:
                return Violation(0.0, 0.0, 0)
            protected = protected_directions(memory)
            off, axes, count = update @ protected, leverage(memory, n, 0, self.protected), self.protected
        return Violation(
            norm=float(off.norm()),
            rounding=float(variance.sum(dim=0) @ axes.clamp_min(0)) ** 0.5,
            num_pairs=m * count,
            detail=lambda: Detail(spectral_norm(off), noise_spectrum(variance)),
        )

    def projection(self, weight: Tensor, tensors: Tensors, soften: float = 0.0) -> Callable[[Tensor], Tensor]:
        """On the directions; where these are not known, off the memory."""
        if self.opened:
            directions = self._directions(tensors, weight.device)
            return lambda update: (update @ directions) @ directions.mT
        memory = self._memory(tensors, weight.device)
        if memory is None:
            return torch.clone
        protected = protected_directions(memory)
        return lambda update: update - (update @ protected) @ protected.mT

    def figures(self) -> Figures:
        """The share of inputs that are protected, and what they hold."""
        added = {item.task: (item.outputs, item.inputs) for item in self.added}
        return Figures(self.protected / self.shape[1], self.energy, added)

    def cost(self, names: Mapping[str, str]) -> Cost:
        """A; one product."""
        m, n = self.shape
        return Cost({names.get("directions", "directions"): n * self.rank}, 2.0 * m * n * self.rank)

    def directions(self, tensors: Tensors) -> tuple[Tensor | None, Tensor | None]:
        """Protected inputs (n, k)."""
        if self.memory is None:
            return None, None
        return None, protected_directions(Basis(tensors["memory"], self.memory.form))

    def spectrum_of(self, tensors: Tensors) -> Spectrum | None:
        """None is stored."""
        return None

    def shares(self, tensors: Tensors) -> TaskShares | None:
        """Not known."""
        return None


@dataclass(frozen=True, eq=False, slots=True)
class _Grown:
    """A memory as it will be stored."""

    memory: Basis | None
    energy: float


class LowRank:
    """Lets a task use the directions of its own inputs, or as many by chance: the control that any choice has to beat.

    The memory begins with the rows that the analysis is given, or empty. `accumulate` (DualGPM): after a task it holds the
    share `energy` of what the task's rows read, too.
    """

    carries: tuple[Carry, ...] = ("accumulate",)
    defaults = Defaults(rate=RATE)

    def __init__(self, settings: AnalyzeSettings) -> None:
        self.settings = settings
        self.rank = settings.rank or DEFAULT_RANK
        self.by_chance = settings.resolved_basis == "random"
        self.terms = Terms(
            basis=settings.resolved_basis,
            constraint="lowrank",
            share="inputs kept",
            held="energy kept",
            note="energy kept: of E||x||^2, in inputs kept",
            adds=False,
        )
        # An input that several matrices read is decomposed once; forgotten with the moment itself.
        self._grown: WeakKeyDictionary[Moment, _Grown] = WeakKeyDictionary()
        self._chosen: WeakKeyDictionary[Moment, Tensor] = WeakKeyDictionary()

    def check(self, shapes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """What has no effect, or cannot be."""
        settings = self.settings
        wrong = list[str]()
        idle = [] if settings.data else settings.given("calibration_tokens", "chat", "max_length", "chat_template")
        wrong += [f"{', '.join(idle)} without effect: there is no --data"] if idle else []
        least = min((shape[1] for shape in shapes), default=self.rank)
        return wrong + ([f"--rank {self.rank}: a matrix has {least} inputs"] if self.rank > least else [])

    def measures(self, step: Step, carry: Carry | None = None) -> Measures:
        """Moments: of the analysis' rows, if there are some; of a task's before its first step, and after its last."""
        idle = (step == "derive" and not self.settings.data) or (step == "open" and self.by_chance)
        return "nothing" if idle else "inputs"

    def plan(self, shape: tuple[int, int]) -> Rule:
        """By the shape alone, without a memory."""
        return LowRankRule(shape, min(self.rank, shape[1]), opened=True)

    def derive(self, evidence: Evidence) -> Derived:
        """A memory of the rows, if there are some."""
        return self._closed(evidence, None)

    def carry(self, carry: Carry, previous: Previous, evidence: Evidence) -> Derived:
        """Adds what the task's rows read."""
        return self._closed(evidence, previous)

    def open(self, previous: Previous, evidence: Evidence) -> Derived:
        """The directions of a task."""
        rule, moment = previous.rule, evidence.inputs
        assert isinstance(rule, LowRankRule)
        assert moment is not None
        memory = self._held(previous)
        if moment not in self._chosen:
            self._chosen[moment] = leading_free(moment.value, memory, rule.rank).cpu()
        return self._made(evidence, memory, rule.energy, rule.added, self._chosen[moment])

    def _held(self, previous: Previous) -> Basis | None:
        rule = previous.rule
        assert isinstance(rule, LowRankRule)
        return None if rule.memory is None else Basis(previous.tensors["memory"], rule.memory.form)

    def _closed(self, evidence: Evidence, previous: Previous | None) -> Derived:
        """A rule for the next task: with directions only where they come by chance."""
        memory: Basis | None = None
        energy, added = 0.0, tuple[Added, ...]()
        if previous is not None:
            rule = previous.rule
            assert isinstance(rule, LowRankRule)
            memory, energy, added = self._held(previous), rule.energy, rule.added
        before = 0 if memory is None else memory.directions
        if evidence.inputs is not None:  # else there are no rows, or none reaches it
            if evidence.inputs not in self._grown:
                share = self.settings.energy or DEFAULT_ENERGY
                grown = _Grown(*grow(evidence.inputs.value, memory, share))
                self._grown[evidence.inputs] = grown
            memory, energy = self._grown[evidence.inputs].memory, self._grown[evidence.inputs].energy
        more = (0 if memory is None else memory.directions) - before
        added = (*added, Added(evidence.task, 0, more)) if more else added
        if not self.by_chance:
            return self._made(evidence, memory, energy, added, None)
        rank = self._rank(evidence.shape, memory)
        generator = generator_of(f"{self.settings.seed} {evidence.name} {evidence.task}")
        return self._made(evidence, memory, energy, added, random_free(memory, evidence.shape[1], rank, generator))

    def _rank(self, shape: tuple[int, int], memory: Basis | None) -> int:
        return min(self.rank, shape[1] - (0 if memory is None else memory.directions))

    def _made(
        self,
        evidence: Evidence,
        memory: Basis | None,
        energy: float,
        added: tuple[Added, ...],
        directions: Tensor | None,
    ) -> Derived:
        rule = LowRankRule(
            evidence.shape,
            self._rank(evidence.shape, memory),
            side_of(memory),
            opened=directions is not None,
            energy=energy,
            added=added,
        )
        found = {"memory": None if memory is None else memory.vectors, "directions": directions}
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        shared = {"memory"} if self.by_chance else {"memory", "directions"}
        exact = {"memory"} if evidence.task else set()  # what an earlier archive protects is not rounded again
        return Derived(rule, tensors, frozenset(shared), frozenset(exact))

    def growth(self, carry: Carry, rule: Rule, sizes: Mapping[str, int]) -> int:
        """Bytes of the directions of a task, and by which the memory can grow with it."""
        assert isinstance(rule, LowRankRule)
        n, before = rule.shape[1], 0 if rule.memory is None else rule.memory.columns(rule.shape[1])
        size = max(4, sizes.get("memory", 4))
        opened = (before + rule.rank) * size * n
        added = 0 if carry == "keep" else most_columns(n, rule.protected, n - rule.protected) - before
        return opened + max(0, added) * size * n
