"""Full-rank training inside what is free: W = W0 + dW(W0, A), with the coordinates A of a rule the only parameters.

`protect.protect` gives every targeted matrix of a loaded model a torch parametrization with the coordinates A (float32)
as its parameters. Any optimizer then keeps the constraint exactly, since any A is an allowed update of W. `stack.py` says
when the dense W that the forward reads is folded from pristine W0 and A, and when the full-size G becomes gradients of A.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from sculptor.archive.store import Entry
from sculptor.checkpoint.orientation import as_out_in
from sculptor.edits.merge import Merged, merge_matrix
from sculptor.methods.rule import Prepared, Rule, Tensors, Working
from sculptor.numerics.precision import multiplies_bfloat16
from sculptor.training.parallelism import check_copied, check_held, check_whole


def _exactly(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves tensors, without changing their dtype: `model.to(bfloat16)` is for weights."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved


class WeightSource(Protocol):
    """What matrices ask for their folded weights."""

    def weight(self, coordinates: "Coordinates", pristine: Tensor) -> Tensor:
        """W0 + dW as the module stores it, through autograd where gradients are wanted."""

    def multiply(self, coordinates: "Coordinates", pristine: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (W0 + dW)^T + b; a rule that has less to do so gets X and dY in the place of a gradient."""

    def expire(self, moved: bool = False) -> None:
        """It is folded again when it is next asked for; `moved` says that tensors are elsewhere now."""

    def check_untouched(self) -> None:
        """Refuses to merge where somebody has written into what was handed out."""


class _Values(nn.ParameterList):
    """Coordinates: float32, whatever the model is cast to, and whole."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            check_held("coordinates", [value])
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(_exactly(fn), recurse)  # type: ignore[no-untyped-call]


class Coordinates(nn.Module):
    """The parametrization of one matrix: its rule's tensors and the coordinates.

    Attributes:
        record: of the matrix in the archive.
        values: the parameters A, float32.
        compute_dtype: of the folded weight; None for that of W0.
        source: hands out the folded weight: the stack that the matrix is in.
        archive: identity of the archive that they come from.
        off: hand out W0: the model is the base for now.
        relative_rate, scale: the learning rate that suits the archive's rules, over the size of W0, and that size.
    """

    source: "WeightSource"
    archive: str = ""

    def __init__(
        self,
        read: Callable[[], Entry],
        weight: Tensor,
        compute_dtype: torch.dtype | None = None,
        known: dict[Any, Any] | None = None,
        soften: float = 0.0,
    ) -> None:
        super().__init__()
        entry = read()
        self.record = entry.record
        self.compute_dtype = compute_dtype
        self.soften = soften
        self.off = False
        self.relative_rate = self.scale = 1.0
        self._read = read
        prepared = prepare_training(
            entry, weight.device, compute_dtype or weight.dtype, soften, {} if known is None else known
        )
        self._fingerprint = prepared.fingerprint
        self._shapes = self.rule.shapes  # asked for in every forward pass, and made anew each time
        for name, tensor in prepared.tensors.items():
            self.register_buffer(name, tensor, persistent=False)  # moves with the model; never saved
        self.values = _Values(
            nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=weight.device)) for shape in self._shapes
        )
        self._held = self.values._parameters  # asked for in every forward pass: a list of torch's own takes its time

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
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    @property
    def trained(self) -> list[Tensor]:
        """The parameters A."""
        return list(self._held.values())  # type: ignore[arg-type]

    def original(self, module: nn.Module) -> nn.Parameter:
        """The parameter of a protected module that W0 is, or is a part of."""
        if self.record.window.is_whole:
            parametrized: Any = module._modules["parametrizations"]  # as above: asked for often
            return parametrized._modules["weight"]._parameters["original"]  # type: ignore[no-any-return]
        return module.get_parameter(self.record.parameter.rpartition(".")[2])

    def pristine(self, module: nn.Module) -> Tensor:
        """W0, as the protected module stores it."""
        return self.record.window.of(self.original(module))

    def forward(self, weight: Tensor) -> Tensor:
        """The folded weight, given pristine W0 as the module stores it."""
        check_copied(self)
        if self.off:
            return weight.to(self.compute_dtype or weight.dtype)
        ask = _ask_eagerly if torch.compiler.is_dynamo_compiling() else _ask
        return ask(self, weight)

    def multiply(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the folded weight, given pristine W0."""
        if self.off or torch.compiler.is_dynamo_compiling():
            return nn.functional.linear(x, self.forward(weight), bias)
        check_copied(self)
        return self.source.multiply(self, weight, x, bias)

    def check(self, weight: Tensor) -> None:
        """Refuses to fold what is not here as a whole.

        Raises:
            TrainingError: if other programs have taken parts of it.
        """
        check_whole(self.name, weight, self.values, self._shapes)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.source.expire(moved=True)
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
        self.source.expire()
        for a in self.values:
            a.data, a.grad = torch.empty(0), None
        for name in list(self._buffers):
            self._buffers[name] = None

    def fingerprint(self) -> list[float]:
        """Identifies the bases the coordinates belong to, up to rounding."""
        return self._fingerprint


def _ask(coordinates: Coordinates, weight: Tensor) -> Tensor:
    return coordinates.source.weight(coordinates, weight)


# `torch.compile` would trace the fold of every matrix for itself, and what decides whether to fold again.
_ask_eagerly = _disable_dynamo(_ask)


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

    Products are formed in bf16 where the weights are bf16 on a device that multiplies it, else in float32: the gradient is
    no finer, and the merge reads the bases again.

    Args:
        entry: of a matrix that may change.
        device: where it is trained.
        compute_dtype: dtype of the folded weight.
        soften: strength of the slowing down.
        known: what was made before; matrices that read the same input share its basis.
    """
    working = Working(device, working_dtype(compute_dtype, device), soften, entry.record.tensors, known)
    return entry.rule.prepare(entry.tensors, working)


def working_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of a rule's tensors as training uses them, for weights that are folded to `compute_dtype`."""
    return torch.bfloat16 if compute_dtype == torch.bfloat16 and multiplies_bfloat16(device) else torch.float32
