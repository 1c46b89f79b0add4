"""Projecting a finished fine-tune onto what an archive of its base leaves free.

    W = W0 + alpha P_soft(W1 - W0)

P keeps what the rule of each matrix allows (`Projectable`): of a staircase the free pairs. Pair (i, j) of importance
h = g_i c_j is multiplied by 1 / (1 + soft h / mean), the mean being that of the matrix: what stays, a of d, makes the sum of
h a^2 / mean + (a - d)^2 / soft least. What no matrix of the archive is stays as in the base, as it does in training.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sculptor.archive.store import Archive, Entry
from sculptor.checkpoint.orientation import as_out_in, to_device
from sculptor.checkpoint.reader import part_name
from sculptor.edits.difference import Where
from sculptor.errors import EditError
from sculptor.methods.rule import Projectable


def project(entry: Entry, base: Tensor, difference: Tensor, soft: float = 0.0) -> Tensor:
    """What of a difference an archive allows, float64, as stored.

    Args:
        entry: of the archive.
        base: W0 as stored.
        difference: W1 - W0 as stored, float64; products run on its device.
        soft: how strongly what matters is reduced.

    Raises:
        EditError: if the rule does not say what of a finished update is allowed.
    """
    record, device = entry.record, difference.device
    if not isinstance(entry.rule, Projectable):
        raise EditError(
            f"{record.name}: a rule of kind {entry.rule.kind} cannot be projected onto; train with it instead"
        )
    weight64 = to_device(base, record.transposed, device)
    update64 = to_device(difference, record.transposed, device)
    return as_out_in(entry.rule.projection(weight64, entry.tensors, soft)(update64), record.transposed)


@dataclass(frozen=True, eq=False, slots=True)
class Projection:
    """`project` as an edit of a checkpoint of the archive's base, and a share of what it leaves.

    Attributes:
        archive: of the base.
        soft: how strongly what matters is reduced.
        alpha: share of what is left.
    """

    by_entry: ClassVar[bool] = False

    archive: Archive
    soft: float = 0.0
    alpha: float = 1.0

    def is_sliced(self, name: str, shape: tuple[int, ...]) -> bool:
        """Where the archive has slices of a tensor."""
        return len(shape) == 3 and any(part_name(name, part) in self.archive for part in range(shape[0]))

    def factor(self, where: Where) -> float:
        """Alpha; 0 for what no matrix of the archive is."""
        return self.alpha if part_name(where.name, where.part) in self.archive else 0.0

    def kept(self, where: Where, base: Tensor, difference: Tensor) -> Tensor:
        """What the rule allows."""
        return project(self.archive.read(part_name(where.name, where.part)), base, difference, self.soft)
