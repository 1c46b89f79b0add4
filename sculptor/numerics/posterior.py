"""How sure each trained number is: the standard deviation of Bayesian gradient descent (arXiv 1803.10123, 2309.08546).

    sigma <- sigma sqrt(1 + (sigma e / 2)^2) - sigma^2 e / 2,     e = E[g(mu + eps sigma) eps] = sigma h

By Stein's identity e is sigma times the mean second derivative h, for which the squared gradient stands. A sample of
g eps would cost a pass, and at the size of a language model its noise, |g|, is thousands of times sigma h.

Kept is p = (sigma_0 / sigma)^2 - 1, the precision gained: it starts at 0, and small gains are not lost beside 1. With
k = sigma_0^2 h, x = k / (2 (1 + p)) and sigma' = sigma / (x + sqrt(1 + x^2)), it grows by k (x + sqrt(1 + x^2)).
"""

from torch import Tensor


def gain_(precision: Tensor, gradient: Tensor, evidence: float) -> None:
    """Adds what a step's data say, in place.

    Args:
        precision: p, gained so far (...).
        gradient: g (...), of the step.
        evidence: what a gradient of 1 adds to p, as a square of it: sigma_0^2 times the number of samples that it stands for.
    """
    k = gradient.square().mul_(evidence)
    x = k / (2 * (1 + precision))
    precision.addcmul_(k, x + (1 + x * x).sqrt_())


def shares(precision: Tensor) -> Tensor:
    """(sigma / sigma_0)^2: what of its step each number takes."""
    return 1 / (1 + precision)
