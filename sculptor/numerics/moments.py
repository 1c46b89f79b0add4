"""Second moments of what a matrix reads and of the gradients of what it writes, and their truncated form.

With x (n) a token's input to W (m, n) and g (m) the gradient of the loss with respect to its output,

    C = E[x x^T],    G = E[g g^T],    curvature of a change dW:  tr(G dW C dW^T)

(K-FAC, Martens and Grosse 2015). Moments of several sources, each of unit trace, simply add. What is kept of a
moment (d, d) are its k leading eigenvectors with their eigenvalues, and the mean of the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sculptor.numerics.finite import is_finite
from sculptor.numerics.transfer import moved

# Bands of rows that are computed at a time: as wide as products are fast on a CPU, and no more than saves something.
_BAND = 256
_MOST_BANDS = 8


@dataclass(frozen=True, eq=False, slots=True)
class Factor:
    """A truncated second moment: V diag(values) V^T + rest (I - V V^T).

    Attributes:
        vectors: V (d, k), orthonormal, leading first.
        values: (k,), descending, not negative.
        rest: mean eigenvalue of the d - k other directions.
    """

    vectors: Tensor
    values: Tensor
    rest: float

    @property
    def dim(self) -> int:
        """d."""
        return self.vectors.shape[0]

    @property
    def trace(self) -> float:
        """Sum of all eigenvalues."""
        return float(self.values.sum()) + self.rest * (self.dim - self.values.numel())

    def spectrum(self) -> Tensor:
        """All d eigenvalues in the order of the completed basis, float64, on the CPU."""
        return whole_spectrum(self.values, self.rest, self.dim)

    def diagonal(self) -> Tensor:
        """The moment's diagonal (d,), float64."""
        vectors64, values64 = self.vectors.to(torch.float64), self.values.to(torch.float64)
        return vectors64.square() @ (values64 - self.rest) + self.rest

    def dense(self, device: torch.device | None = None) -> Tensor:
        """The moment (d, d), float64."""
        where = self.vectors.device if device is None else device
        vectors64, values64 = moved(self.vectors, where, torch.float64), self.values.to(where, torch.float64)
        found = (vectors64 * (values64 - self.rest)) @ vectors64.T
        found.diagonal().add_(self.rest)
        return found


def whole_spectrum(values: Tensor, rest: float, dim: int) -> Tensor:
    """All `dim` eigenvalues, float64, on the CPU: the stored ones (k,), and the mean of the rest in the place of each."""
    others = torch.full((dim - values.numel(),), rest, dtype=torch.float64)
    return torch.cat([values.to("cpu", torch.float64), others])


def truncate(moment: Tensor, k: int) -> Factor:
    """The `k` leading eigenvectors of a second moment, and the mean of its other eigenvalues.

    Args:
        moment: (d, d), symmetric, positive semidefinite but for rounding; decomposed in float64 on its device.
        k: how many to keep, 0 <= k <= d.

    Returns:
        float64 vectors and values; the trace is that of `moment`.

    Raises:
        ValueError: if `moment` is not square or not finite, or k is out of range.
    """
    d = moment.shape[0]
    if moment.shape != (d, d) or not 0 <= k <= d:
        raise ValueError(f"expected a square matrix and 0 <= k <= its side, got {tuple(moment.shape)}, k={k}")
    if not is_finite(moment):
        raise ValueError("a second moment has NaN or infinite values")
    eigenvalues, eigenvectors = torch.linalg.eigh(moment.to(torch.float64))
    values = eigenvalues.flip(0).clamp_min(0)
    vectors = eigenvectors[:, d - k :].flip(1)
    if k:  # the sign that LAPACK leaves open
        peak = vectors.abs().argmax(dim=0)
        vectors = vectors * torch.where(vectors.gather(0, peak[None])[0] < 0, -1.0, 1.0).to(vectors.dtype)
    rest = float(values[k:].mean()) if k < d else 0.0
    return Factor(vectors.contiguous(), values[:k].contiguous(), rest)


def curvature(update: Tensor, output: Factor | None, input: Factor) -> float:
    """tr(G dW C dW^T), or tr(dW C dW^T) without an output factor, in float64.

    Args:
        update: dW (m, n).
        output: G (m), or None for the identity.
        input: C (n).
    """
    half = _half_applied(input, update.to(torch.float64).T).T  # dW C^1/2
    if output is not None:
        half = _half_applied(output, half)
    return float(half.square().sum())


def _half_applied(factor: Factor, x: Tensor) -> Tensor:
    """M^1/2 x for x (d, w)."""
    vectors64 = factor.vectors.to(x.device, torch.float64)
    roots = factor.values.to(x.device, torch.float64).sqrt()
    scaled = (roots - factor.rest**0.5)[:, None] * (vectors64.T @ x)
    return torch.add(factor.rest**0.5 * x, vectors64 @ scaled)


# Directions a profile tells apart. Curvature is concentrated: more would only grow the archive.
_PROFILED = 64


def profile(moment: Tensor, vectors: Tensor) -> Tensor:
    """How much of a moment lies on each of the leading directions of a basis, and on all others together.

    Args:
        moment: (d, d).
        vectors: (d, k), orthonormal.

    Returns:
        (min(k, 64) + 1,), float64, summing to the trace.
    """
    leading64 = vectors[:, :_PROFILED].to(torch.float64)
    moment64 = moment.to(torch.float64)
    on = ((moment64 @ leading64) * leading64).sum(dim=0)
    return torch.cat([on, (moment64.diagonal().sum() - on.sum()).clamp_min(0)[None]])


def rotate_profile(old: Tensor, old_vectors: Tensor, new_vectors: Tensor) -> Tensor:
    """A profile in another basis, taking the moment as diagonal in the old one: an estimate.

    Args:
        old: (min(k, 64) + 1,), of `old_vectors` (d, k).
        old_vectors: (d, k).
        new_vectors: (d, k'), orthonormal.
    """
    count = old.numel() - 1
    before, after = old_vectors[:, :count].to(torch.float64), new_vectors[:, :_PROFILED].to(torch.float64)
    shares = (after.T @ before).square()  # (new, old)
    others = old[-1] / max(1, before.shape[0] - count)
    on = shares @ old[:-1].to(shares) + others * (1 - shares.sum(dim=1)).clamp_min(0)
    return torch.cat([on, (old.sum().to(on) - on.sum()).clamp_min(0)[None]])


def spread_profile(found: Tensor, dim: int) -> Tensor:
    """The moment's share on each of the d directions of the completed basis, the unprofiled ones alike; sums to 1."""
    count = found.numel() - 1
    rest = (found[-1] / max(1, dim - count)).expand(dim - count)
    spread = torch.cat([found[:-1], rest]).to(torch.float64)
    return spread / spread.sum().clamp_min(torch.finfo(torch.float64).tiny)


def add_symmetric(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right where that is symmetric: on the diagonal and above it, for `mirror` to complete.

    In bands from their diagonal block on, little more than half of the products where there are many.

    Args:
        total: (d, d), changed in place.
        left, right: (tokens, d); the rows of one are those of the other, scaled.
    """
    for start, stop in _bands(total.shape[0]):
        total[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])


def mirror(total: Tensor) -> None:
    """Writes what stands above the diagonal of (d, d) below it, in place."""
    for start, stop in _bands(total.shape[0]):
        total[stop:, start:stop] = total[start:stop, stop:].T


def _bands(d: int) -> list[tuple[int, int]]:
    count = min(max(1, d // _BAND), _MOST_BANDS)
    return [(d * i // count, d * (i + 1) // count) for i in range(count)]
