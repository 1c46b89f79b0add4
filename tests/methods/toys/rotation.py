"""A toy rule: outputs are only rotated, two by two. Not linear in its coordinates, the angles."""

from dataclasses import dataclass

import torch

from sculptor.methods.kinds import Kind
from sculptor.methods.method import Defaults, Derived, Terms
from sculptor.methods.rule import Figures, Prepared, Violation, dense


@dataclass(frozen=True)
class Rotation:
    shape: tuple[int, int]
    kind: str = "rotation-2"
    orthonormal = frozenset()
    reads_weight = True

    @property
    def shapes(self):
        return ((self.shape[0] // 2,),)

    def stored(self):
        return {}

    def prepare(self, tensors, working):
        return Prepared({}, [])

    def update(self, weight, tensors, coordinates):
        c, s = coordinates[0].cos()[..., None] - 1, coordinates[0].sin()[..., None]
        even, odd = weight[..., 0::2, :].to(c.dtype), weight[..., 1::2, :].to(c.dtype)
        return torch.stack([c * even - s * odd, s * even + c * odd], -2).flatten(-3, -2)

    def project(self, weight, tensors, coordinates, gradient):
        with torch.enable_grad():
            angles = coordinates[0].detach().requires_grad_(True)
            return torch.autograd.grad(self.update(weight, tensors, [angles]), angles, dense(gradient).float())

    def violation(self, tensors, weight, update, variance):
        even, odd, new = weight[0::2], weight[1::2], weight + update
        sine, cosine = even * new[1::2] - odd * new[0::2], even * new[0::2] + odd * new[1::2]
        off = update - self.update(weight, {}, [torch.atan2(sine.sum(1), cosine.sum(1))])
        return Violation(float(off.norm()), float(variance.sum()) ** 0.5, off.numel())

    def figures(self):
        return Figures(0.0, 0.0, {})


@dataclass(frozen=True)
class Turns:
    settings: object
    terms = Terms("rotation", "norms", "-", "-", "outputs are rotated two by two", adds=False)
    defaults = Defaults(rate=1.6, scaled=False)

    def derive(self, evidence):
        return Derived(Rotation(evidence.shape), {})


KIND = Kind(Rotation, Turns)
