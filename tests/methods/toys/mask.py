"""A toy rule: only the smallest entries of every matrix are trained."""

from dataclasses import dataclass

from sculptor.methods.kinds import Kind
from sculptor.methods.method import Defaults, Derived, Terms
from sculptor.methods.rule import Figures, Prepared, Violation, dense


@dataclass(frozen=True)
class Mask:
    shape: tuple[int, int]
    free: int
    kind: str = "few"
    orthonormal = frozenset()
    reads_weight = False

    @property
    def shapes(self):
        return ((self.free,),)

    def stored(self):
        return {"entries": (self.free,)}

    def prepare(self, tensors, working):
        entries = tensors["entries"].to(working.device)
        return Prepared({"entries": entries}, [float(entries.double().cos().sum())])

    def update(self, weight, tensors, coordinates):
        (a,) = coordinates
        flat = a.new_zeros(*a.shape[:-1], self.shape[0] * self.shape[1])
        return flat.scatter(-1, tensors["entries"], a).unflatten(-1, self.shape)

    def project(self, weight, tensors, coordinates, gradient):
        return (dense(gradient).flatten(-2).gather(-1, tensors["entries"]).float(),)

    def violation(self, tensors, weight, update, variance):
        frozen, error = update.flatten().clone(), variance.flatten().clone()
        frozen[tensors["entries"]] = error[tensors["entries"]] = 0
        return Violation(float(frozen.norm()), float(error.sum()) ** 0.5, frozen.numel() - self.free)

    def figures(self):
        return Figures(1 - self.free / (self.shape[0] * self.shape[1]), 0.0, {})


@dataclass(frozen=True)
class Smallest:
    settings: object
    terms = Terms("mask", "mask", "frozen entries", "-", "the largest entries of every matrix", adds=True)
    defaults = Defaults(rate=0.2)

    def derive(self, evidence):
        free = evidence.shape[0] * evidence.shape[1] // 5
        return Derived(
            Mask(evidence.shape, free), {"entries": evidence.weight().abs().flatten().argsort()[:free].sort()[0]}
        )


KIND = Kind(Mask, Smallest)
