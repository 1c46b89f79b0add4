"""Full-rank training inside what is free: W = W0 + dW(W0, A), with the coordinates A of a rule the only parameters.

`protect.protect` gives every targeted matrix of a loaded model a torch parametrization with the coordinates A (float32)
as its parameters. The gradient of A is taken as soon as the full-size G appears; any optimizer then keeps the
constraint exactly, since any A is an allowed update of W. The dense W that the forward reads is folded from pristine W0 and
A once per optimizer step.

When to fold again cannot be told from `A._version` alone: fused optimizers do not advance it. A forward folds
again when it finds a gradient on A (the optimizer may be about to step, or have stepped without clearing it),
once after one was there, and when the version did move (values set by hand or loaded). `fold="manual"` leaves it
to the caller's `refresh`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sculptor.archive.store import Entry
from sculptor.checkpoint.orientation import as_out_in
from sculptor.edits.merge import Merged, merge_matrix
from sculptor.methods.rule import Prepared, Rule, Tensors, Working
from sculptor.numerics.precision import float32_products

FoldMode = Literal["automatic", "manual"]


class _Fold(torch.autograd.Function):
    """Hands out the folded weight; its gradient goes to the coordinates."""

    @staticmethod
    def forward(ctx: Any, owner: "Coordinates", weight: Tensor, *coordinates: Tensor) -> Tensor:
        ctx.owner = owner
        ctx.save_for_backward(weight)
        assert owner.folded is not None
        return owner.folded.view_as(owner.folded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        owner: Coordinates = ctx.owner
        gradient = gradients[0].contiguous()  # as autograd stores it in a parameter, so that streaming gives the same
        transposed = owner.record.transposed
        (weight,) = (as_out_in(saved, transposed) for saved in ctx.saved_tensors)
        # Exactness lives in A and in the float64 merge, so TF32 does for the projection and the fold.
        with float32_products(gradient.device, tf32=True):
            values = list(owner.values)
            return (None, None, *owner.rule.project(weight, owner.tensors, values, as_out_in(gradient, transposed)))


def _exactly(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves tensors, without changing their dtype: `model.to(bfloat16)` is for weights."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved


class _Values(nn.ParameterList):
    """Coordinates: float32, whatever the model is cast to."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(_exactly(fn), recurse)  # type: ignore[no-untyped-call]


def _mark(values: Iterable[Tensor]) -> Tensor:
    """Tells contents apart: of every tensor's bits their sum and, where torch has it, their exclusive or; on its device."""
    marks = []
    for value in values:
        bits = value.detach().reshape(-1).view(torch.int32)
        marks.append(bits.sum(dtype=torch.int64))
        if hasattr(torch, "hash_tensor") and bits.numel():
            marks.append(torch.hash_tensor(bits).to(torch.int64))
    return torch.stack(marks)


class Coordinates(nn.Module):
    """The parametrization of one matrix: its rule's tensors, the coordinates, and the folded weight.

    Attributes:
        record: of the matrix in the archive.
        values: the parameters A, float32.
        folded: W0 + dW in the compute dtype, as the module stores it; None before the first forward.
        relative_rate, scale: the learning rate that suits the archive's rules, over the size of W0, and that size.
    """

    def __init__(
        self,
        read: Callable[[], Entry],
        weight: Tensor,
        compute_dtype: torch.dtype | None = None,
        mode: FoldMode = "automatic",
        known: dict[Any, Any] | None = None,
        soften: float = 0.0,
    ) -> None:
        super().__init__()
        entry = read()
        self.record = entry.record
        self.compute_dtype = compute_dtype
        self.mode = mode
        self.soften = soften
        self.relative_rate = self.scale = 1.0
        self.folded: Tensor | None = None
        self._read = read
        prepared = prepare_training(
            entry, weight.device, compute_dtype or weight.dtype, soften, {} if known is None else known
        )
        self._fingerprint = prepared.fingerprint
        for name, tensor in prepared.tensors.items():
            self.register_buffer(name, tensor, persistent=False)  # moves with the model; never saved
        self.values = _Values(
            nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=weight.device)) for shape in self.rule.shapes
        )
        self._folded_of: Tensor | None = None

    @property
    def name(self) -> str:
        """Of the matrix."""
        return self.record.name

    @property
    def rule(self) -> Rule:
        """What may change in the matrix."""
        return self.record.rule

    @property
    def tensors(self) -> Tensors:
        """The rule's, as they are used in training."""
        return dict(self.named_buffers())

    def forward(self, weight: Tensor) -> Tensor:
        """The folded weight, given pristine W0 as the module stores it."""
        if self.folded is None or self.folded.device != weight.device or self.folded.dtype != self._dtype(weight):
            self.refresh(weight)
        elif self.mode == "automatic":
            # By content: optimizers may change parameters behind every counter, and keep gradients elsewhere.
            assert self._folded_of is not None
            if not torch.equal(_mark(self.values), self._folded_of):
                self.refresh(weight)
        folded: Tensor = _Fold.apply(self, weight, *self.values)  # type: ignore[no-untyped-call]
        return folded

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Folds again from pristine W0."""
        with float32_products(weight.device, tf32=True):
            self.folded = folded_weight(
                self.rule, self.tensors, list(self.values), weight, self.record.transposed, self._dtype(weight)
            )
        if self.mode == "automatic":
            self._folded_of = _mark(self.values)

    def _dtype(self, weight: Tensor) -> torch.dtype:
        return self.compute_dtype or weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.folded = None
        return super()._apply(_exactly(fn), recurse)  # type: ignore[no-untyped-call]

    def merged(self, weight: Tensor) -> Merged:
        """W0 + dW in the dtype of W0, in bases read anew from the archive.

        Raises:
            ArchiveError: if the archive is not there any more, or has changed.
            TrainingError: if it cannot be merged.
        """
        return merge_matrix(
            self._read(), list(self.values), weight, weight.dtype, soften=self.soften, fingerprint=self._fingerprint
        )

    def release(self) -> None:
        """Frees everything it holds; it cannot be used any more."""
        self.folded = None
        for a in self.values:
            a.data, a.grad = torch.empty(0), None
        for name in list(self._buffers):
            self._buffers[name] = None

    def fingerprint(self) -> list[float]:
        """Identifies the bases the coordinates belong to, up to rounding."""
        return self._fingerprint


def folded_weight(
    rule: Rule,
    tensors: Tensors,
    coordinates: Sequence[Tensor],
    pristine: Tensor,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """W0 + dW as the module stores it, added in float32 and rounded once."""
    update = as_out_in(rule.update(as_out_in(pristine, transposed), tensors, coordinates), transposed)
    if pristine.dtype == update.dtype == dtype:
        return torch.add(pristine, update).contiguous()  # which is what that does, in one pass
    return (pristine.to(torch.float32) + update).to(dtype).contiguous()


def prepare_training(
    entry: Entry, device: torch.device, compute_dtype: torch.dtype, soften: float, known: dict[Any, Any]
) -> Prepared:
    """A rule's tensors as training uses them, and their fingerprint.

    Products are formed in bf16 where the weights are bf16 on a GPU, else in float32: the gradient is no finer, and the
    merge reads the bases again.

    Args:
        entry: of a matrix that may change.
        device: where it is trained.
        compute_dtype: dtype of the folded weight.
        soften: strength of the slowing down.
        known: what was made before; matrices that read the same input share its basis.
    """
    dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 and device.type == "cuda" else torch.float32
    return entry.rule.prepare(entry.tensors, Working(device, dtype, soften, entry.record.tensors, known))
