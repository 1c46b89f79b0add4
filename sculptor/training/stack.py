"""When weights are folded and gradients projected: matrices of one shape at once where starting work is what costs.

The dense W of a matrix is W0 + dW(W0, A), folded once per optimizer step and handed out by one node of autograd, whose
backward turns the full-size gradients G into those of A. On a GPU small matrices share a node: all of them are folded and
projected in a few large products. Their G wait for each other, so a stack is bounded in bytes.

When to fold again cannot be told from `A._version` alone: fused optimizers do not advance it. So contents are compared,
once in every pass: when the model begins one, after a backward pass, and when a matrix asks a second time.
`fold="manual"` leaves it to the caller's `refresh`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sculptor.checkpoint.orientation import as_out_in
from sculptor.errors import TrainingError
from sculptor.methods.rule import OuterProduct, RuleStack, Stackable, Tensors
from sculptor.numerics.finite import is_finite
from sculptor.numerics.precision import float32_products
from sculptor.training.coordinates import Coordinates, folded_weight
from sculptor.training.linear import SMALL, is_narrowed, multiply

FoldMode = Literal["automatic", "manual"]
# Of the gradients of a stack.
STACK_BYTES = 2**29


class Member(NamedTuple):
    """A module whose weight is parametrized, and its coordinates."""

    module: nn.Module
    coordinates: Coordinates

    @property
    def pristine(self) -> Tensor:
        """W0, as the module stores it."""
        return self.coordinates.pristine(self.module)


class _Fold(torch.autograd.Function):
    """Hands out folded weights; their gradients go to the coordinates."""

    @staticmethod
    def forward(ctx: Any, stack: "Stack", folded: Sequence[Tensor], *coordinates: Tensor) -> tuple[Tensor, ...]:
        ctx.stack = stack
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in folded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        stack: Stack = ctx.stack
        return None, None, *stack.project(gradients)


class Stack:
    """Matrices that are folded and projected together.

    Args:
        members: of one shape and orientation, with rules of one key, if there are several.
        mode: whether to look for changed coordinates.
    """

    def __init__(self, members: Sequence[Member], mode: FoldMode) -> None:
        self.members = tuple(members)
        self.mode = mode
        self._places = {member.coordinates.name: i for i, member in enumerate(members)}
        self._transposed = members[0].coordinates.record.transposed
        self._folded: list[Tensor] | None = None
        self._given: tuple[Tensor, ...] = ()  # through autograd
        self._mark: Tensor | None = None  # of the coordinates that were folded
        self._versions: list[list[int]] = []
        self._rules = _stack_of(members) if len(members) > 1 else None
        self._tensors: Tensors | None = None  # of all rules, stacked
        self._unsure = False
        self._served: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew: a copy of a model folds for itself, and would lose what others wrote there."""
        self.check_untouched()
        return self.__dict__ | {"_folded": None, "_given": (), "_mark": None, "_tensors": None}

    def weight(self, coordinates: Coordinates, pristine: Tensor) -> Tensor:
        """As `WeightSource.weight`."""
        place, folded = self._current(coordinates, pristine)
        if not torch.is_grad_enabled():
            return folded
        if not self._given:
            self._given = _Fold.apply(self, self._folded, *self._values())  # type: ignore[no-untyped-call]
        return self._given[place]

    def multiply(self, coordinates: Coordinates, pristine: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `WeightSource.multiply`."""
        if len(self.members) == 1 and any(a.requires_grad for a in coordinates.trained):
            dtype = coordinates.compute_dtype or pristine.dtype
            if is_narrowed(coordinates.rule, x, dtype):
                _, folded = self._current(coordinates, pristine)
                return multiply(x, folded, bias, self._take, coordinates.trained)
        return nn.functional.linear(x, self.weight(coordinates, pristine), bias)

    def _take(self, gradient: OuterProduct) -> Sequence[Tensor | None]:
        return self.project([gradient])

    def _current(self, coordinates: Coordinates, pristine: Tensor) -> tuple[int, Tensor]:
        """Where a matrix is, and its folded weight."""
        place = self._places[coordinates.name]
        held = None if self._folded is None else self._folded[place]
        if held is None or (held.device, held.dtype) != (pristine.device, coordinates.compute_dtype or pristine.dtype):
            self._fold()
        elif self.mode == "automatic" and self._may_have_changed(place):
            self._look()
        self._served.add(place)
        assert self._folded is not None
        return place, self._folded[place]

    def expire(self, moved: bool = False) -> None:
        """As `WeightSource.expire`; what others wrote is not lost to a move."""
        if moved:
            self.check_untouched()
        self._folded, self._given, self._mark = None, (), None
        if moved:
            self._tensors = None

    def check_untouched(self) -> None:
        """Refuses to merge what was written into what `weight` handed out: merging begins at W0, and would lose it.

        Raises:
            TrainingError: naming the first matrix.
        """
        if self._folded is None or self._mark is None or not torch.equal(_mark(self._values()), self._mark):
            return  # what is handed out next is folded anew
        with torch.inference_mode(False), torch.no_grad(), float32_products(self.members[0].pristine.device, tf32=True):
            made = self._weights()
        if not all(map(is_finite, made)):
            return  # of which merging speaks
        given = self._given or self._folded  # a view whose data somebody has replaced is written to as well
        for member, held, shown, then in zip(self.members, self._folded, given, made, strict=True):
            if not (_is_same(held, then) and (shown.data_ptr() == held.data_ptr() or _is_same(shown.detach(), then))):
                raise TrainingError(
                    f"{member.coordinates.name}: something beside its coordinates was written into the folded weight (an "
                    "adapter merged into it, an edit in place), which merging would lose; call sculptor.merge(model) first"
                )

    def doubt(self) -> None:
        """Coordinates may have been changed."""
        self._unsure = True

    def _values(self) -> list[Tensor]:
        return [a for member in self.members for a in member.coordinates.trained]

    def _may_have_changed(self, place: int) -> bool:
        if self._unsure or place in self._served:
            return True
        return self._versions[place] != [a._version for a in self.members[place].coordinates.trained]

    def _look(self) -> None:
        """By counters, and by content: optimizers may change parameters behind every counter, and keep gradients elsewhere."""
        assert self._mark is not None
        if self._versions == self._counted() and torch.equal(_mark(self._values()), self._mark):
            self._begin_pass()
        else:
            self._fold()

    def _begin_pass(self) -> None:
        self._given, self._unsure = (), False
        self._served.clear()
        self._versions = self._counted()

    def _counted(self) -> list[list[int]]:
        """What torch counts of changes in place."""
        return [[a._version for a in member.coordinates.trained] for member in self.members]

    def _fold(self) -> None:
        """From pristine W0."""
        self.expire()
        for member in self.members:
            member.coordinates.check(member.pristine)
        tf32 = float32_products(self.members[0].pristine.device, tf32=True)
        with torch.inference_mode(False), torch.no_grad(), tf32:
            self._folded = self._weights()
            self._mark = _mark(self._values()) if self.mode == "automatic" else None
        self._begin_pass()

    def _weights(self) -> list[Tensor]:
        first = self.members[0].coordinates
        dtype = first.compute_dtype or self.members[0].pristine.dtype
        if len(self.members) == 1:
            pristine, values = self.members[0].pristine, list(first.values)
            return [folded_weight(first.rule, first.tensors, values, pristine, self._transposed, dtype)]
        pristine = self._stacked([member.pristine for member in self.members])
        assert self._rules is not None
        update = self._rules.update(self._stacked_tensors(), _coordinates(self.members))
        folded = update.add_(pristine) if update.dtype == torch.float32 else pristine.to(torch.float32) + update
        return list((folded.mT if self._transposed else folded).to(dtype).contiguous().unbind())

    def project(self, gradients: Sequence[Tensor | OuterProduct | None]) -> list[Tensor | None]:
        """The gradient of every A of every matrix, None where none reached it."""
        self.doubt()
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        members = [self.members[i] for i in reached]
        given = [gradient for gradient in gradients if gradient is not None]
        # Exactness lives in A and in the float64 merge, so TF32 does for the projection and the fold.
        with float32_products(self.members[0].pristine.device, tf32=True):
            found = dict(zip(reached, self._projected(members, given), strict=True))
        nothing = [tuple(None for _ in member.coordinates.values) for member in self.members]
        return [part for i, none in enumerate(nothing) for part in found.get(i, none)]

    def _projected(
        self, members: Sequence[Member], gradients: Sequence[Tensor | OuterProduct]
    ) -> list[tuple[Tensor, ...]]:
        if len(members) == 1:
            coordinates, gradient = members[0].coordinates, gradients[0]
            weight = as_out_in(members[0].pristine, self._transposed)
            if isinstance(gradient, Tensor):
                # Contiguous as autograd stores it in a parameter, so that streaming gives the same.
                gradient = as_out_in(gradient.contiguous(), self._transposed)
            return [coordinates.rule.project(weight, coordinates.tensors, list(coordinates.values), gradient)]
        if len(members) == len(self.members):
            assert self._rules is not None
            rules, tensors = self._rules, self._stacked_tensors()
        else:  # some of them have no gradient
            rules = _stack_of(members)
            tensors = rules.prepare([member.coordinates.tensors for member in members])
        full = self._stacked([each for each in gradients if isinstance(each, Tensor)])  # as they all are
        return rules.project(tensors, _coordinates(members), full)

    def _stacked(self, matrices: Sequence[Tensor]) -> Tensor:
        return torch.stack([as_out_in(matrix, self._transposed) for matrix in matrices])

    def _stacked_tensors(self) -> Tensors:
        """Held once: what the matrices hold are views from now on."""
        if self._tensors is None:
            assert self._rules is not None
            self._tensors = self._rules.prepare([member.coordinates.tensors for member in self.members])
            for i, member in enumerate(self.members):
                for name, own in member.coordinates.tensors.items():
                    held = self._tensors[name][i][..., -own.shape[-1] :]  # a stack may have begun earlier, with zeros
                    if held.shape == own.shape:
                        member.coordinates.register_buffer(name, held, persistent=False)
        return self._tensors


def make_stacks(members: Iterable[Member], mode: FoldMode) -> list[Stack]:
    """Gives every matrix the stack that it is folded with."""
    groups: dict[Any, list[Member]] = {}
    for member in members:
        weight, coordinates = member.pristine, member.coordinates
        rule = coordinates.rule
        key: Any = coordinates.name
        if isinstance(rule, Stackable) and weight.numel() <= SMALL.get(weight.device.type, 0):
            kinds = type(rule), rule.stack_key(coordinates.tensors)
            dtypes = weight.device, weight.dtype, coordinates.compute_dtype
            key = (*kinds, *dtypes, coordinates.record.transposed)
        groups.setdefault(key, []).append(member)
    stacks = []
    for group in groups.values():
        weight = group[0].pristine
        count = max(1, STACK_BYTES // max(1, weight.numel() * weight.element_size()))
        stacks += [Stack(group[i : i + count], mode) for i in range(0, len(group), count)]
    for stack in stacks:
        for member in stack.members:
            member.coordinates.source = stack
    return stacks


def _stack_of(members: Sequence[Member]) -> RuleStack:
    first, *others = (member.coordinates.rule for member in members)
    assert isinstance(first, Stackable)
    return first.stack(others)


def _coordinates(members: Sequence[Member]) -> list[list[Tensor]]:
    return [member.coordinates.trained for member in members]


def _is_same(now: Tensor, then: Tensor) -> bool:
    """Whether two folds differ by rounding alone, which turns a last bit in few places."""
    if now.shape != then.shape:
        return False
    apart, noise = (now - then).abs(), 2.0**-22 * then.abs().max()
    turned = torch.finfo(then.dtype).eps * then.abs() + noise
    return bool((apart <= turned).all()) and int(torch.count_nonzero(apart > noise)) <= 0.01 * apart.numel()


# A prime: rows and columns of matrices do not fall on it, so what is turned round or moved by them does not stay in its sum.
_SUMS = 61


def _mark(values: Sequence[Tensor]) -> Tensor:
    """Tells contents apart: of every 61st number's bits the sum and, where torch has it, of all the exclusive or; on the device.

    One sum would not see an order, and signs only in their number.
    """
    bits = torch.cat([value.detach().reshape(-1) for value in values]).view(torch.int32)
    whole = bits.numel() // _SUMS * _SUMS
    marks = [bits[:whole].view(-1, _SUMS).sum(dim=0, dtype=torch.int64), bits[whole:].to(torch.int64)]
    if hasattr(torch, "hash_tensor") and bits.numel():
        marks.append(torch.hash_tensor(bits).to(torch.int64).reshape(1))
    return torch.cat(marks)
