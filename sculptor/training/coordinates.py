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

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sculptor.archive.manifest import SideRecord
from sculptor.archive.store import Subspaces
from sculptor.numerics.bases import Basis
from sculptor.numerics.free_space import FreeSpace
from sculptor.numerics.precision import float32_products
from sculptor.numerics.reflectors import CompleteBasis

FoldMode = Literal["automatic", "manual"]


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
        gradient = gradients[0].T if owner.transposed else gradients[0]
        # Exactness lives in A and in the float64 merge, so TF32 does for the projection and the fold.
        with float32_products(gradient.device, tf32=True):
            return (None, *owner.space.project(gradient.to(torch.float32)))


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
        subspaces: Subspaces,
        device: torch.device,
        compute_dtype: torch.dtype,
        mode: FoldMode = "automatic",
        complete: Callable[[SideRecord, Basis], CompleteBasis] | None = None,
        softening: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        record = subspaces.record
        self.name = record.name
        self.staircase = record.staircase
        self.transposed = record.transposed
        self.compute_dtype = compute_dtype
        self.mode = mode
        self.folded: Tensor | None = None
        self.stale = False
        self.shifts: dict[str, int] = {}
        complete = complete or (lambda _, basis: complete_basis(basis, device))
        for side, stored, basis in (
            ("output", record.output, subspaces.output),
            ("input", record.input, subspaces.input),
        ):
            if stored is not None and basis is not None:
                found = complete(stored, basis)
                # Buffers, so that they move with the model; never saved.
                self.register_buffer(f"{side}_reflectors", found.reflectors, persistent=False)
                self.register_buffer(f"{side}_triangle", found.triangle, persistent=False)
                self.shifts[side] = found.shift
        self.soft = softening is not None
        if softening is not None:
            self.register_buffer("soft_outputs", softening[0], persistent=False)
            self.register_buffer("soft_inputs", softening[1], persistent=False)
        self.blocks = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)) for shape in self.space.shapes
        )
        self._versions: tuple[int, ...] = ()

    @property
    def space(self) -> FreeSpace:
        """Where the coordinates live."""
        softening = (getattr(self, "soft_outputs"), getattr(self, "soft_inputs")) if self.soft else None  # noqa: B009
        return FreeSpace(self.staircase, self._side("output"), self._side("input"), softening)

    def _side(self, side: str) -> CompleteBasis | None:
        if side not in self.shifts:
            return None
        return CompleteBasis(getattr(self, f"{side}_reflectors"), getattr(self, f"{side}_triangle"), self.shifts[side])

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
            update = self.space.fold(list(self.blocks))
            stored = update.T if self.transposed else update
            self.folded = (weight.to(torch.float32) + stored).to(self.compute_dtype).contiguous()
        self.stale = False
        self._versions = tuple(a._version for a in self.blocks)

    @torch.no_grad()
    def update64(self) -> Tensor:
        """dW (m, n) in float64: what the merge adds."""
        return self.space.to64().fold([a.to(torch.float64) for a in self.blocks])

    def release(self) -> None:
        """Frees everything it holds; it cannot be used any more."""
        self.folded = None
        for a in self.blocks:
            a.data, a.grad = torch.empty(0), None
        for name in list(self._buffers):
            self._buffers[name] = None

    def fingerprint(self) -> list[float]:
        """Identifies the bases the coordinates belong to, up to rounding."""
        return self.space.fingerprint()


def complete_basis(basis: Basis, device: torch.device) -> CompleteBasis:
    """A stored side completed on a device, for training: factorised in float64, held in float32."""
    return CompleteBasis.of(basis.to(device, torch.float64)).to(dtype=torch.float32)
