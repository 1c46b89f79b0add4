"""Pruning where the loss is flat, EsaCL-style (Ren and Honavar 2024, arXiv 2401.05667, whose own formula is not public).

    score_ij = h_ij w_ij^2 / 2,    h_ij = G_ii C_jj

By second order the score is what the loss rises by when weight (i, j) becomes 0, given the moments C of what the matrix
reads and G of the gradients of what it writes (K-FAC's diagonal; Optimal Brain Damage with it). The lowest go first.
"""

import torch
from torch import Tensor

from sculptor.archive.store import Entry
from sculptor.checkpoint.orientation import as_out_in
from sculptor.methods.rule import Weighing


def prune(weight: Tensor, sparsity: float, importance: Tensor | None = None) -> Tensor:
    """A matrix without its weights of lowest score: exactly round(sparsity * number of weights) of them are 0 in their place.

    Args:
        weight: as stored, any floating dtype.
        sparsity: share that becomes 0.
        importance: h of every weight, float64, of the same shape; None for the smallest weights. Of equal scores the
            smaller weights go first, and of these the first.
    """
    squares = weight.to(torch.float64).square().flatten()
    order = squares.argsort(stable=True)
    if importance is not None:
        order = order[(squares * importance.flatten())[order].argsort(stable=True)]
    pruned = weight.flatten().clone()
    pruned[order[: round(sparsity * weight.numel())]] = 0
    return pruned.view_as(weight)


def importance_of(entry: Entry) -> Tensor | None:
    """h of every weight of a matrix, as stored, float64; None where its archive has no curvature."""
    rule = entry.rule
    found = rule.entry_curvature(entry.tensors) if isinstance(rule, Weighing) else None
    if found is None:
        return None
    outputs, inputs = found
    return as_out_in(outputs[:, None] * inputs, entry.record.transposed)
