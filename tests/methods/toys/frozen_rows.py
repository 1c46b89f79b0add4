"""A toy rule: the first outputs of every matrix stay as they are."""

from dataclasses import dataclass

from torch.nn.functional import pad

from sculptor.methods.kinds import Kind
from sculptor.methods.method import Defaults, Derived, Terms
from sculptor.methods.rule import Figures, Prepared, Violation, dense


@dataclass(frozen=True)
class FrozenRows:
    shape: tuple[int, int]
    count: int
    kind: str = "frozen-rows"
    orthonormal = frozenset()
    reads_weight = False

    @property
    def shapes(self):
        return ((self.shape[0] - self.count, self.shape[1]),)

    def stored(self):
        return {}

    def prepare(self, tensors, working):
        return Prepared({}, [float(self.count)])

    def update(self, weight, tensors, coordinates):
        return pad(coordinates[0], (0, 0, self.count, 0))

    def project(self, weight, tensors, coordinates, gradient):
        return (dense(gradient)[..., self.count :, :].float().contiguous(),)

    def violation(self, tensors, weight, update, variance):
        frozen = update[: self.count]
        return Violation(float(frozen.norm()), float(variance[: self.count].sum()) ** 0.5, frozen.numel())

    def figures(self):
        return Figures(self.count / self.shape[0], 0.0, {})


@dataclass(frozen=True)
class FirstRows:
    settings: object
    terms = Terms("rows", "rows", "frozen rows", "-", "the first rows of every matrix", adds=False)
    defaults = Defaults(rate=0.2)

    def derive(self, evidence):
        return Derived(FrozenRows(evidence.shape, evidence.shape[0] // 4), {})


KIND = Kind(FrozenRows, FirstRows)
