"""The stored directions of one side of a matrix, and what of an update falls on the frozen pairs of two sides."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sculptor.numerics.linalg import complement
from sculptor.numerics.staircase import Staircase
from sculptor.numerics.transfer import moved

Form = Literal["leading", "free"]


@dataclass(frozen=True, eq=False, slots=True)
class Basis:
    """One side's protected directions, stored as themselves or as their complement.

    Attributes:
        vectors: (d, c) orthonormal. `leading`: the protected directions, most important first. `free`: the
            complement of the protected ones, whose own order is then lost (enough where there is one cut).
        form: which of the two it is.
    """

    vectors: Tensor
    form: Form

    @property
    def dim(self) -> int:
        """d."""
        return self.vectors.shape[0]

    @property
    def directions(self) -> int:
        """How many directions are protected."""
        return self.vectors.shape[1] if self.form == "leading" else self.dim - self.vectors.shape[1]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Basis":
        """The same basis elsewhere."""
        return Basis(moved(self.vectors, device, dtype), self.form)


def store_smaller(leading: Tensor) -> Basis:
    """A single-cut side in whichever form has fewer columns: (d, k) itself, or its complement (d, d - k)."""
    d, k = leading.shape
    return Basis(leading, "leading") if stored_columns(d, k) == k else Basis(complement(leading), "free")


def stored_columns(d: int, k: int) -> int:
    """How many columns a single-cut side of d directions, k of them protected, is stored in."""
    return k if 2 * k <= d else d - k


def most_columns(d: int, k: int, added: int) -> int:
    """The most columns that a single-cut side can take with up to `added` directions more than k."""
    return max(stored_columns(d, count) for count in (k, min(k + added, max(k, d // 2))))


def protected_directions(basis: Basis) -> Tensor:
    """Orthonormal columns (d, k) that span the protected directions, in the stored dtype."""
    if basis.form == "leading":
        return basis.vectors
    return complement(basis.vectors).to(basis.vectors.dtype)


def component(basis: Basis | None, y: Tensor, start: int, stop: int) -> Tensor:
    """A matrix whose Frobenius norm is that of Q[:, start:stop]^T y, from the stored directions alone.

    Args:
        basis: the side, or None for the identity (then the range is everything).
        y: (d, c), float64.
        start: first direction.
        stop: one past the last.

    Returns:
        (stop - start, c), or (d, c) where the range is the complement of what is stored.
    """
    if basis is None or (start, stop) == (0, y.shape[0]):
        return y
    q = basis.vectors.to(y.dtype)
    k = basis.directions
    if basis.form == "free":
        return q.T @ y if (start, stop) == (k, y.shape[0]) else y - q @ (q.T @ y)
    if stop <= k:
        return q[:, start:stop].T @ y
    return y - q[:, :start] @ (q[:, :start].T @ y)


def frozen_parts(update: Tensor, staircase: Staircase, output: Basis | None, input: Basis | None) -> list[Tensor]:
    """The frozen part of dW in its own directions, by row groups, in float64.

    Args:
        update: dW (m, n).
        staircase: which pairs are frozen.
        output: the stored side U (m), or None.
        input: the stored side V (n), or None.
    """
    update64 = update.to(torch.float64)
    parts = []
    for start, stop, reach in staircase.groups:
        if reach:
            hit = component(input, update64.T, 0, reach).T  # (m, reach)
            parts.append(component(output, hit, start, stop))
    return parts


def leverage(basis: Basis | None, dim: int, start: int, stop: int) -> Tensor:
    """Squared row norms of Q[:, start:stop]: how much of each coordinate axis lies in those directions.

    Returns:
        (dim,), float64, between 0 and 1.
    """
    if basis is None or (start, stop) == (0, dim):
        device = None if basis is None else basis.vectors.device
        return torch.full((dim,), float((start, stop) == (0, dim)), dtype=torch.float64, device=device)
    q = basis.vectors.to(torch.float64)
    k = basis.directions
    if basis.form == "free":
        free = q.square().sum(dim=1)
        return free if (start, stop) == (k, dim) else 1 - free
    if stop <= k:
        return q[:, start:stop].square().sum(dim=1)
    return 1 - q[:, :start].square().sum(dim=1)


def frozen_variance(variance: Tensor, staircase: Staircase, output: Basis | None, input: Basis | None) -> float:
    """Expected ||frozen part||^2 of independent errors with the given variance per entry.

    E||Q_U[:, a:b]^T E Q_V[:, :r]||^2 = h^T variance l, with h and l the leverages of the two sides. Large weights
    have large rounding errors and lie in the leading directions, so this is more than the frozen share of all.

    Args:
        variance: (m, n), float64.
        staircase: which pairs are frozen.
        output: the stored side U (m), or None.
        input: the stored side V (n), or None.
    """
    m, n = variance.shape
    total = 0.0
    for start, stop, reach in staircase.groups:
        if reach:
            rows, columns = leverage(output, m, start, stop), leverage(input, n, 0, reach)
            total += float(rows.to(variance.device) @ variance @ columns.to(variance.device))
    return total


def extend(basis: Basis | None, directions: Tensor, *, single_cut: bool) -> Basis | None:
    """Adds directions to a side, after those it has.

    Args:
        basis: the side as it was, or None where nothing was stored.
        directions: (d, j); what of them is already protected is left out, the rest is orthonormalised.
        single_cut: whether the form may be chosen by size (`store_smaller`).

    Returns:
        The side with up to j more directions, float64; None if there are none at all.
    """
    new = directions.to(torch.float64)
    old = protected_directions(basis).to(torch.float64) if basis is not None else new[:, :0]
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        new = new - old @ (old.T @ new)
    if new.shape[1]:
        left, sizes, _ = torch.linalg.svd(new, full_matrices=False)
        new = left[:, sizes > 1e-6]  # directions that were protected already vanish here
    if basis is None and new.shape[1] == 0:
        return None
    if basis is not None and basis.form == "free":
        free64 = basis.vectors.to(torch.float64)
        free64 = free64 @ complement(free64.T @ new)  # the free directions that are left, old span untouched
        return Basis(free64, "free")
    leading = torch.cat([old, new], dim=1)
    return store_smaller(leading) if single_cut else Basis(leading, "leading")
