"""KL(p || q) of predictions, in nats a token: whole, or from the likeliest tokens and a few drawn from the rest.

With S the k likeliest tokens of p, and r the mass of all others,

    KL_k(p || q) = sum over S of p_i log(p_i / q_i) + r_p log(r_p / r_q)  <=  KL(p || q)

by the log-sum inequality: merging outcomes loses information. What it loses is the divergence inside the rest, which tokens v drawn
from there by p estimate without bias,

    KL(p || q) = KL_k(p || q) + r_p E_v [log(p_v / r_p) - log(q_v / r_q)],        v ~ p / r_p

Both are 0 where q = p. The logarithm is averaged as it is: forms that are never negative (Schulman's r - 1 - log r) miss the mass
that q puts on tokens nobody draws. What is known of p are k + 1 + m numbers a token, in the place of a whole vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Truncated(NamedTuple):
    """The k likeliest of V tokens, by position, and m of the others, drawn by their probability.

    Attributes:
        ids: (t, k) int32, the likeliest first.
        log_probabilities: (t, k + 1) float32; the last column is of all other tokens together.
        drawn: (t, m) int32, with repetition; m = 0 where nothing was drawn.
        log_shares: (t, m) float32, of the rest, that each of these has.
    """

    ids: Tensor
    log_probabilities: Tensor
    drawn: Tensor
    log_shares: Tensor


def divergence(base: Tensor, new: Tensor) -> Tensor:
    """KL(base || new) of logits (t, V) each -> (t,), in the wider of float32 and their dtype."""
    _check(base, new)
    p, q = (_wide(logits).log_softmax(dim=-1) for logits in (base, new))
    return _expected(p, q)


def truncate(logits: Tensor, k: int, draws: int, generator: torch.Generator) -> Truncated:
    """What is kept of logits (t, V): the min(k, V - 1) likeliest tokens, the mass of the rest, and some drawn from it.

    Args:
        logits: (t, V).
        k: tokens to keep.
        draws: m, from the rest.
        generator: of the device of the logits.

    Raises:
        ValueError: if fewer than one is to be kept, or there is none beside it.
    """
    if logits.ndim != 2 or k < 1 or logits.shape[1] < 2:
        raise ValueError(f"expected logits (t, V) with V > 1 and k >= 1, got {list(logits.shape)} and {k}")
    ids = logits.topk(min(k, logits.shape[1] - 1), dim=-1).indices
    merged, _ = _merged(_wide(logits), ids)
    rest = _rest(_wide(logits), ids).log_softmax(dim=-1)
    rest = rest.masked_fill(rest.isnan(), 0.0)  # no mass at all: any token is drawn, and counts nothing
    drawn = torch.multinomial(rest.exp(), draws, True, generator=generator) if draws and len(rest) else ids[:, :0]
    return Truncated(
        ids.to(torch.int32), merged.to(torch.float32), drawn.to(torch.int32), rest.gather(1, drawn).to(torch.float32)
    )


def truncated_divergence(base: Truncated, logits: Tensor) -> Tensor:
    """The lower bound KL_k(base || softmax(logits)) -> (t,), in the wider of float32 and the dtype of logits (t, V).

    Raises:
        ValueError: if the shapes do not belong together.
    """
    _check_kept(base, logits)
    return _expected(_wide(base.log_probabilities), _merged(_wide(logits), base.ids.long())[0])


def estimated_divergence(base: Truncated, logits: Tensor) -> Tensor:
    """KL(base || softmax(logits)) -> (t,) without bias, the lower bound where nothing was drawn; dtypes as above.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    _check_kept(base, logits)
    wide = _wide(logits)
    merged, rest = _merged(wide, base.ids.long())
    bound = _expected(_wide(base.log_probabilities), merged)
    if not base.drawn.shape[1]:
        return bound
    shares = wide.gather(1, base.drawn.long()) - rest
    mass = _wide(base.log_probabilities)[:, -1]
    inside = (_wide(base.log_shares) - shares).mean(dim=-1).masked_fill(mass.isneginf(), 0.0)
    return bound + mass.exp() * inside


def _expected(p: Tensor, q: Tensor) -> Tensor:
    """Sum of p log(p / q) of log-probabilities; what has none under p counts nothing."""
    return (p.exp() * (p - q).masked_fill(p.isneginf(), 0.0)).sum(dim=-1)


def _merged(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (t, k + 1) of some tokens, and of all others together; and logsumexp (t, 1) of the others' logits.

    The vocabulary is gone through once: it takes as long as a few blocks of a small model.
    """
    kept, rest = logits.gather(1, ids), _rest(logits, ids).logsumexp(dim=-1, keepdim=True)
    whole = torch.logaddexp(kept.logsumexp(dim=-1, keepdim=True), rest)
    return torch.cat([kept, rest], dim=-1) - whole, rest


def _rest(logits: Tensor, ids: Tensor) -> Tensor:
    """Logits (t, V) without those of some tokens."""
    return logits.scatter(1, ids, -torch.inf)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def _check_kept(base: Truncated, logits: Tensor) -> None:
    (t, k), p = base.ids.shape, base.log_probabilities.shape
    if logits.ndim != 2 or p != (t, k + 1) or t != logits.shape[0] or base.drawn.shape != base.log_shares.shape:
        raise ValueError(f"logits {list(logits.shape)} do not go with {list(base.ids.shape)} and {list(p)}")


def _check(base: Tensor, new: Tensor) -> None:
    if base.ndim != 2 or base.shape != new.shape:
        raise ValueError(f"expected logits of one shape (t, V), got {list(base.shape)} and {list(new.shape)}")
