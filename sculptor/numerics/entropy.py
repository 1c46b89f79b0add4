"""Weights of tokens by how undecided a prediction is (EAFT, arXiv 2601.02151).

    weight = H(p) / ln k        p = softmax of the k largest logits, k = 20

1 where the k likeliest tokens are equally likely, 0 where one is certain: what the model contradicts with confidence is
learned least, which is where fine-tuning forgets most. k = 20 is the paper's, in the place of the whole vocabulary.
"""

import math

import torch
from torch import Tensor

TOP = 20


@torch.no_grad()
def entropy_weights(logits: Tensor, top: int = TOP) -> Tensor:
    """Normalised entropy of predictions, without gradient.

    Args:
        logits: (tokens, vocabulary).
        top: how many of the largest count.

    Returns:
        (tokens,), float32, between 0 and 1.

    Raises:
        ValueError: if there are fewer than two logits, which leave nothing undecided.
    """
    count = min(top, logits.shape[-1])
    if logits.ndim != 2 or count < 2:
        raise ValueError(f"logits of shape {list(logits.shape)}; expected (tokens, vocabulary) of two or more")
    largest = logits.float().topk(count, dim=-1).values.softmax(dim=-1)
    entropy: Tensor = torch.special.entr(largest).sum(dim=-1)
    return entropy / math.log(count)
