"""Matrices as the files store them, and in the (out, in) form that everything else is about."""

import torch
from torch import Tensor

from sculptor.numerics.transfer import moved


def as_out_in(weight: Tensor, transposed: bool) -> Tensor:
    """A stored matrix in the (out, in) form that everything here is about."""
    return weight.T if transposed else weight


def to_device(weight: Tensor, transposed: bool, device: torch.device) -> Tensor:
    """A stored matrix in the (out, in) form, float64, on a device."""
    return as_out_in(moved(weight, device, torch.float64), transposed)
