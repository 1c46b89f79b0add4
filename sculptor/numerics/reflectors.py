"""Stored directions completed to an orthonormal basis of the whole space, without forming it.

Applying takes leading stacks: reflectors (..., d, c) and what is turned (..., d, w).

Householder's factorisation of the stored columns (d, c) gives c reflectors whose product

    H = I - Y T Y^T        (compact WY form, Schreiber and Van Loan 1989)

is orthogonal whatever the input, and whose first j columns span the first j stored ones, for every j. Applying it
costs 4 d c w operations for w vectors and stores d c numbers, where the d - c directions of the complement, written
out, may be many times as many. Where they are not, they are written out: of half of the directions that is a third to a fifth less
to apply.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.numerics.bases import Basis, Form

# Where many directions are turned, it is a multiple of this: tensor cores take other numbers up to six times slower.
ALIGNED = 16
WIDE = 256


def box_start(start: int, dim: int) -> int:
    """`start`, or a few directions of `dim` before it, so that there is a good number from there on."""
    free = dim - start
    return start if free < WIDE else max(0, dim - -(-free // ALIGNED) * ALIGNED)


@dataclass(frozen=True, eq=False, slots=True)
class CompleteBasis:
    """Q (d, d): the protected directions first, the free ones behind them.

    Attributes:
        reflectors: Y (d, c), unit lower trapezoidal.
        triangle: T (c, c), upper triangular.
        shift: where in H the first direction of Q is: 0 if the stored columns are the leading ones, c if they
            are the free ones, which come last in Q.
    """

    reflectors: Tensor
    triangle: Tensor
    shift: int

    @classmethod
    def of(cls, basis: Basis) -> "CompleteBasis":
        """Completes a stored side; factorised and returned in float64, on its device."""
        d, c = basis.vectors.shape
        packed, tau = torch.geqrf(basis.vectors.to(torch.float64))
        unit = torch.eye(d, c, dtype=torch.float64, device=packed.device)
        # A reflector with tau 0 is the identity, which a vector of zeros says as well.
        reflectors = (packed.tril(-1) + unit) * (tau != 0)
        return cls(reflectors, _triangle(reflectors), c if basis.form == "free" else 0)

    @property
    def dim(self) -> int:
        """d."""
        return self.reflectors.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """In which products are formed."""
        return self.reflectors.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "CompleteBasis":
        """The same elsewhere. T is derived anew from Y in float64, so H is orthogonal to rounding in any dtype."""
        dtype = dtype or self.reflectors.dtype
        reflectors = self.reflectors.to(device=device, dtype=dtype)
        if dtype == self.reflectors.dtype:
            return CompleteBasis(reflectors, self.triangle.to(device=device), self.shift)
        return CompleteBasis(reflectors, _triangle(reflectors.to(torch.float64)).to(dtype), self.shift)

    def apply(self, x: Tensor, start: int = 0) -> Tensor:
        """Q[:, start:] x.

        Args:
            x: (d - start, w), in the dtype of the basis.
            start: first direction.

        Returns:
            (d, w).
        """
        y = self.reflectors
        order = _by_columns(x)
        parts = (_product(y[..., there, :].mT, x[..., here, :], order) for here, there in self._segments(start))
        inner = sum(parts, start=x.new_zeros(()))
        out = _product(y, _product(self.triangle, -inner, order), order)
        for here, there in self._segments(start):
            out[..., there, :] += x[..., here, :]
        return out

    def apply_transposed(self, x: Tensor, start: int = 0) -> Tensor:
        """Q[:, start:]^T x.

        Args:
            x: (d, w), in the dtype of the basis.
            start: first direction.

        Returns:
            (d - start, w).
        """
        y = self.reflectors
        order = _by_columns(x)
        inner = _product(self.triangle.mT, _product(y.mT, x, order), order)  # (c, w)
        parts = [_difference(x[..., there, :], y[..., there, :], inner, order) for _, there in self._segments(start)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.mT for part in parts], -1).mT if order else torch.cat(parts, -2)

    def cost(self, start: int) -> int:
        """Multiplications for one vector."""
        d, c = self.reflectors.shape[-2:]
        return c * (d + c + d - start)

    def fingerprint(self, start: int, count: int = 8) -> list[float]:
        """A few numbers that identify the directions from `start` on up to rounding."""
        return _fingerprint(self, start, count)

    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by name."""
        return {"reflectors": self.reflectors, "triangle": self.triangle}

    def _segments(self, start: int) -> Iterator[tuple[slice, slice]]:
        """Directions start, start + 1, ... of Q as (where among them, where in H), in order."""
        turn = self.dim - self.shift if self.shift else self.dim  # from here on Q reads H from its beginning
        if start < turn:
            yield slice(0, turn - start), slice(start + self.shift, turn + self.shift)
        if turn < self.dim:
            first = max(start, turn)
            yield slice(first - start, self.dim - start), slice(first - turn, self.dim - turn)


@dataclass(frozen=True, eq=False, slots=True)
class Columns:
    """The directions Q[:, start:] written out, (d, d - start); some frozen ones may be 0 in their place."""

    columns: Tensor

    @property
    def dim(self) -> int:
        """d."""
        return self.columns.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """In which products are formed."""
        return self.columns.dtype

    @property
    def start(self) -> int:
        """The first direction."""
        return self.columns.shape[-2] - self.columns.shape[-1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Columns":
        """The same elsewhere."""
        return Columns(self.columns.to(device=device, dtype=dtype or self.columns.dtype))

    def apply(self, x: Tensor, start: int) -> Tensor:
        """Q[:, start:] x, for x (d - start, w)."""
        return _product(self.columns[..., start - self.start :], x, _by_columns(x))

    def apply_transposed(self, x: Tensor, start: int) -> Tensor:
        """Q[:, start:]^T x, for x (d, w)."""
        return _product(self.columns[..., start - self.start :].mT, x, _by_columns(x))

    def cost(self, start: int) -> int:
        """Multiplications for one vector."""
        return self.dim * (self.dim - start)

    def fingerprint(self, start: int, count: int = 8) -> list[float]:
        """As that of `CompleteBasis`."""
        return _fingerprint(self, start, count)

    def tensors(self) -> dict[str, Tensor]:
        """As those of `CompleteBasis`."""
        return {"columns": self.columns}


FreeSide = CompleteBasis | Columns


def named_tensors(name: str, side: FreeSide) -> dict[str, Tensor]:
    """What a side consists of, by names that begin with its own."""
    return {f"{name}_{part}": tensor for part, tensor in side.tensors().items()}


# Results lie in memory as what is turned does, row by row or column by column: on a GPU, copying a large matrix from one
# to the other takes longer than the products.


def _by_columns(x: Tensor) -> bool:
    return x.stride(-2) < x.stride(-1)


def _product(a: Tensor, x: Tensor, by_columns: bool) -> Tensor:
    """a @ x."""
    return (x.mT @ a.mT).mT if by_columns else a @ x


def _difference(x: Tensor, a: Tensor, b: Tensor, by_columns: bool) -> Tensor:
    """x - a @ b."""
    if x.ndim > 2:
        return x - _product(a, b, by_columns)
    if by_columns:
        return torch.addmm(x.T, b.T, a.T, alpha=-1).T
    return torch.addmm(x, a, b, alpha=-1)


def free_side(basis: Basis, start: int) -> FreeSide:
    """What applies the directions from `start` on of a stored side at the least cost, in float64 on its device."""
    c, free = basis.vectors.shape[1], basis.dim - start
    if basis.form == "free" and _is_stored(c, basis.dim, start):
        vectors64 = basis.vectors[:, max(0, c - free) :].to(torch.float64)
        return Columns(torch.nn.functional.pad(vectors64, (free - vectors64.shape[1], 0)))
    complete = CompleteBasis.of(basis)
    if not is_written_out(basis.form, c, basis.dim, start):
        return complete
    identity = torch.eye(free, dtype=torch.float64, device=basis.vectors.device)
    return Columns(complete.apply(identity, start))


def is_written_out(form: Form, columns: int, dim: int, start: int) -> bool:
    """Whether the directions from `start` on of a side of which so many `columns` are stored are `Columns`, or a complete basis."""
    if form == "free" and _is_stored(columns, dim, start):
        return True
    held, reflectors = dim * (dim - start), columns * (dim + columns)
    return 3 * held <= 4 * reflectors and held <= reflectors + columns * (dim - start)  # to keep, and to do


def _is_stored(columns: int, dim: int, start: int) -> bool:
    """Whether so many stored free directions are those from `start` on, but for a few frozen ones that are 0 in their place."""
    # What begins at 0 may leave all directions free, stored or not.
    return dim - start <= columns or 0 < start == box_start(dim - columns, dim)


def _fingerprint(side: FreeSide, start: int, count: int) -> list[float]:
    """The coordinates of a fixed vector, summed with fixed signs.

    Coordinates stored in one basis mean nothing in another; two that differ by a sign or a rotation differ
    here by about 1, two that differ by rounding by about 1e-6.
    """
    some = next(iter(side.tensors().values()))
    positions = torch.arange(1, side.dim + 1, dtype=torch.float64, device=some.device)
    fixed = torch.cos(positions**2).to(some.dtype)[:, None]
    coordinates = side.apply_transposed(fixed, start)[:, 0].to(torch.float64)
    signs = torch.cos(positions[:count, None] * positions[None, : side.dim - start])
    return [float(x) for x in signs @ coordinates]


def _triangle(reflectors64: Tensor) -> Tensor:
    """T of the product of reflectors I - tau y y^T, tau = 2 / y^T y: its inverse is the upper part of Y^T Y."""
    gram = reflectors64.T @ reflectors64
    diagonal = gram.diagonal() / 2
    inverse = gram.triu(1) + torch.diag(torch.where(diagonal == 0, 1.0, diagonal))
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    triangle: Tensor = torch.linalg.solve_triangular(inverse, identity, upper=True)
    return triangle.contiguous()  # as it is where it was copied to: products tell the difference in the last bit
