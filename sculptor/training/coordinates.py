"""Full-rank training inside what is free: W = W0 + sum_g left_g A_g right_g^T, with A the only parameters.

`protect.protect` gives every targeted matrix of a loaded model a torch parametrization with the coordinates A
(float32) as its parameters. The gradient of A is left^T G right, taken as soon as the full-size G appears; any
optimizer then keeps the constraint exactly, since an update of A is an allowed update of W whatever made it.
The dense W that the forward reads is folded from pristine W0 and A once per optimizer step.

When to fold again cannot be told from `A._version` alone: fused optimizers do not advance it. A forward folds
again when it finds a gradient on A (the optimizer may be about to step, or have stepped without clearing it),
once after one was there, and when the version did move (values set by hand or loaded). `fold="manual"` leaves it
to the caller's `refresh`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sculptor.archive.store import Subspaces
from sculptor.errors import TrainingError
from sculptor.numerics.free_space import FreeSpace, first_free
from sculptor.numerics.precision import float32_products
from sculptor.numerics.reflectors import FreeSide, free_side

FoldMode = Literal["automatic", "manual"]
# Stored tensor, first free direction and device of a side -> what applies it, and its fingerprint.
KnownSides = dict[tuple[str, int, torch.device], tuple[FreeSide, list[float]]]
FINGERPRINT_TOLERANCE = 1e-4  # rounding is near 1e-6, another basis near 1


class _Fold(torch.autograd.Function):
    """Hands out the folded weight; its gradient goes to the coordinates."""

    @staticmethod
    def forward(ctx: Any, owner: "Coordinates", *coordinates: Tensor) -> Tensor:
        ctx.owner = owner
        assert owner.folded is not None
        return owner.folded.view_as(owner.folded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        owner: Coordinates = ctx.owner
        owner.stale = True
        gradient = gradients[0].contiguous()  # as autograd stores it in a parameter, so that streaming gives the same
        gradient = gradient.T if owner.transposed else gradient
        # Exactness lives in A and in the float64 merge, so TF32 does for the projection and the fold.
        with float32_products(gradient.device, tf32=True):
            return (None, *owner.space.project(gradient))


class Coordinates(nn.Module):
    """The parametrization of one matrix: its free space, the coordinates in it, and the folded weight.

    Attributes:
        name: the tensor in the checkpoint.
        blocks: the parameters A, one (p, q) per row group with free pairs, float32.
        folded: W0 + dW in the compute dtype, as the module stores it; None before the first forward.
        stale: whether a gradient was seen since the last fold.
    """

    def __init__(
        self,
        read: Callable[[], Subspaces],
        device: torch.device,
        compute_dtype: torch.dtype,
        mode: FoldMode = "automatic",
        known: KnownSides | None = None,
        softening: Callable[[Subspaces], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        subspaces = read()
        record = subspaces.record
        self.record = record
        self.name = record.name
        self.staircase = record.staircase
        self.transposed = record.transposed
        self.compute_dtype = compute_dtype
        self.mode = mode
        self.folded: Tensor | None = None
        self.stale = False
        self._read = read
        known = {} if known is None else known
        space, self._fingerprint = training_space(subspaces, device, compute_dtype, known, softening)
        for name, tensor in space.tensors().items():
            self.register_buffer(name, tensor, persistent=False)  # moves with the model; never saved
        self._form = space.to("meta")
        self.blocks = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)) for shape in space.shapes
        )
        self._versions: tuple[int, ...] = ()

    @property
    def space(self) -> FreeSpace:
        """Where the coordinates live."""
        return self._form.at(dict(self.named_buffers()))

    def forward(self, weight: Tensor) -> Tensor:
        """The folded weight, given pristine W0 as the module stores it."""
        if self.folded is None or self.folded.device != weight.device:
            self.refresh(weight)
        elif self.mode == "automatic":
            has_gradient = any(a.grad is not None for a in self.blocks)
            if has_gradient or self.stale or self._versions != tuple(a._version for a in self.blocks):
                self.refresh(weight)
                self.stale = has_gradient
        folded: Tensor = _Fold.apply(self, *self.blocks)  # type: ignore[no-untyped-call]
        return folded

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Folds again from pristine W0."""
        with float32_products(weight.device, tf32=True):
            self.folded = folded_weight(self.space, list(self.blocks), weight, self.transposed, self.compute_dtype)
        self.stale = False
        self._versions = tuple(a._version for a in self.blocks)

    def update64(self) -> Tensor:
        """dW (m, n) in float64, in bases read anew from the archive: what the merge adds.

        Raises:
            ArchiveError: if the archive is not there any more, or has changed.
        """
        return merge_update(self._read(), self.space.softening, list(self.blocks), self._fingerprint)

    def release(self) -> None:
        """Frees everything it holds; it cannot be used any more."""
        self.folded = None
        for a in self.blocks:
            a.data, a.grad = torch.empty(0), None
        for name in list(self._buffers):
            self._buffers[name] = None

    def fingerprint(self) -> list[float]:
        """Identifies the bases the coordinates belong to, up to rounding."""
        return self._fingerprint


def folded_weight(
    space: FreeSpace, coordinates: Sequence[Tensor], pristine: Tensor, transposed: bool, dtype: torch.dtype
) -> Tensor:
    """W0 + dW as the module stores it, added in float32 and rounded once."""
    update = space.fold(list(coordinates))
    update = update.T if transposed else update
    if pristine.dtype == update.dtype == dtype:
        return torch.add(pristine, update).contiguous()  # which is what that does, in one pass
    return (pristine.to(torch.float32) + update).to(dtype).contiguous()


def training_space(
    subspaces: Subspaces,
    device: torch.device,
    compute_dtype: torch.dtype,
    known: KnownSides,
    softening: Callable[[Subspaces], tuple[Tensor, Tensor]] | None = None,
) -> tuple[FreeSpace, list[float]]:
    """The free space of a matrix as training uses it, and the fingerprint of its bases.

    Products are formed in bf16 where the weights are bf16 on a GPU, else in float32: the gradient is no finer, and the
    merge reads the bases again.

    Args:
        subspaces: of a matrix with free pairs.
        device: where it is trained.
        compute_dtype: dtype of the folded weight.
        known: sides made before; matrices that read the same input share its basis.
        softening: gives h and w of a matrix, or None.
    """
    dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 and device.type == "cuda" else torch.float32
    record = subspaces.record
    starts = first_free(record.staircase)
    sides: list[FreeSide | None] = [None, None]
    fingerprint: list[float] = []
    stored = ((record.output, subspaces.output), (record.input, subspaces.input))
    for i, (side, basis) in enumerate(stored):
        if side is None or basis is None:
            continue
        key = (side.tensor, starts[i], device)
        if key not in known:
            found = free_side(basis.to(device, torch.float64), starts[i])
            known[key] = found.to(dtype=dtype), found.fingerprint(starts[i])
        sides[i], mark = known[key]
        fingerprint += mark
    gains = softening(subspaces) if softening else None
    return FreeSpace(record.staircase, sides[0], sides[1], gains), fingerprint


def merge_update(
    subspaces: Subspaces, gains: tuple[Tensor, Tensor] | None, coordinates: Sequence[Tensor], expected: list[float]
) -> Tensor:
    """dW (m, n) in float64 from trained coordinates, in the archive's own bases.

    Raises:
        TrainingError: if these bases complete differently from those that were trained in.
    """
    device = coordinates[0].device
    record = subspaces.record
    starts = first_free(record.staircase)
    bases = (subspaces.output, subspaces.input)
    output, input = (
        None if basis is None else free_side(basis.to(device, torch.float64), start)
        for basis, start in zip(bases, starts, strict=True)
    )
    space = FreeSpace(record.staircase, output, input, gains).to(device, torch.float64)
    if not same_fingerprint(space.fingerprint(), expected):
        raise TrainingError(
            f"{record.name}: its bases complete differently than when training began; merge on the device and with the "
            "library that trained"
        )
    return space.fold([a.detach().to(torch.float64) for a in coordinates])


def same_fingerprint(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same bases, rounding aside."""
    return len(found) == len(expected) and all(
        abs(x - y) <= FINGERPRINT_TOLERANCE for x, y in zip(found, expected, strict=True)
    )
