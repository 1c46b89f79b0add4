"""KL(p || q) of predictions, in nats a token: whole, or of the likeliest tokens and the rest together.

With S the k likeliest tokens of p, and r the mass of all others,

    KL_k(p || q) = sum over S of p_i log(p_i / q_i) + r_p log(r_p / r_q)  <=  KL(p || q)

by the log-sum inequality: merging outcomes loses information, so what a truncated distribution gives is a lower bound. Both are
0 where q = p. What is known of p are k + 1 numbers a token, in the place of a whole vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Truncated(NamedTuple):
    """The k likeliest of V tokens, by position.

    Attributes:
        ids: (t, k) int32, the likeliest first.
        log_probabilities: (t, k + 1) float32; the last column is of all other tokens together.
    """

    ids: Tensor
    log_probabilities: Tensor


def divergence(base: Tensor, new: Tensor) -> Tensor:
    """KL(base || new) of logits (t, V) each -> (t,), in the wider of float32 and their dtype."""
    _check(base, new)
    p, q = (_wide(logits).log_softmax(dim=-1) for logits in (base, new))
    return _expected(p, q)


def truncate(logits: Tensor, k: int) -> Truncated:
    """What is kept of logits (t, V): the min(k, V - 1) likeliest tokens, and the rest.

    Raises:
        ValueError: if fewer than one is to be kept, or there is none beside it.
    """
    if logits.ndim != 2 or k < 1 or logits.shape[1] < 2:
        raise ValueError(f"expected logits (t, V) with V > 1 and k >= 1, got {list(logits.shape)} and {k}")
    ids = logits.topk(min(k, logits.shape[1] - 1), dim=-1).indices
    return Truncated(ids.to(torch.int32), _merged(_wide(logits), ids).to(torch.float32))


def truncated_divergence(base: Truncated, logits: Tensor) -> Tensor:
    """The lower bound KL_k(base || softmax(logits)) -> (t,), in the wider of float32 and the dtype of logits (t, V).

    Raises:
        ValueError: if the shapes do not belong together.
    """
    ids, p = base.ids.long(), _wide(base.log_probabilities)
    if logits.ndim != 2 or p.shape != (logits.shape[0], ids.shape[1] + 1) or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"logits {list(logits.shape)} do not go with {list(ids.shape)} and {list(p.shape)}")
    q = _merged(_wide(logits), ids)
    return _expected(p, q)


def _expected(p: Tensor, q: Tensor) -> Tensor:
    """Sum of p log(p / q) of log-probabilities; what has none under p counts nothing."""
    return (p.exp() * (p - q).masked_fill(p.isneginf(), 0.0)).sum(dim=-1)


def _merged(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (t, k + 1) of some tokens, and of all others together."""
    whole = logits.logsumexp(dim=-1, keepdim=True)
    rest = logits.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], dim=-1) - whole


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _check(base: Tensor, new: Tensor) -> None:
    if base.ndim != 2 or base.shape != new.shape:
        raise ValueError(f"expected logits of one shape (t, V), got {list(base.shape)} and {list(new.shape)}")
