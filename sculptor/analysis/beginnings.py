"""How much each token of an answer counts in a calibration: its beginning more, since a tuning moves most how answers begin.

A tuning is pushed where its own answers begin: until the first words are right, the loss is there. What other answers begin with
is moved along, and decides the rest of them. Of text that a model says, one token in two hundred is the first of an answer, and a
curvature of the mean hardly sees it. So token t of an answer of n counts w_t = t^-a n / sum_s s^-a: the mean over an answer is 1,
and no answer counts more or less than before. What it is worth is in docs/harm.md.
"""

import torch
from torch import Tensor

from sculptor.checkpoint.architecture import ModelKind
from sculptor.data.examples import IGNORED

FADES = 0.75  # a


def beginning_weights(labels: Tensor, kind: ModelKind) -> Tensor:
    """Weights (B, L), float32, of labels as they are predicted; 1 in text without a prompt, which has no answers.

    Args:
        labels: (B, L) with IGNORED where there is no loss, moved to where they are predicted.
        kind: of the model: a decoder's answers follow tokens without loss, all of what an encoder-decoder says is one.
    """
    ones = torch.ones(labels.shape, device=labels.device)
    if kind not in ("causal", "seq2seq"):
        return ones
    size = labels.shape[1]
    places = torch.arange(size, device=labels.device).expand_as(labels)
    has_loss = labels != IGNORED
    before = places.masked_fill(has_loss, -1).cummax(dim=1).values
    after = places.masked_fill(has_loss, size).flip(1).cummin(dim=1).values.flip(1)
    is_answer = has_loss if kind == "seq2seq" else has_loss & (before >= 0)
    powers = torch.arange(1, size + 1, dtype=torch.float64).pow(-FADES)  # on the CPU: the same sums on every device
    means = powers.cumsum(0) / torch.arange(1, size + 1)
    of, count = (places - before - 1).clamp(min=0), (after - before - 2).clamp(min=0)
    weights = powers.to(labels.device)[of] / means.to(labels.device)[count]
    return torch.where(is_answer, weights.float(), ones)
