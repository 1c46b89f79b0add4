"""Whether a stored matrix is the rounding of an update that its rule allows.

Rounding errors are spread evenly only where the update is far above one unit in the last place. A smaller one moves an entry
by a whole unit or not at all, and what that adds up to has directions, which a bound for errors without any does not explain.
So the question itself is asked: is there an X that the rule allows with |W' - W0 - X| <= half a unit in every entry? Both
sets are convex, and projecting on one and the other in turn ends in what they share, if they share anything (von Neumann's
alternating projections, over-relaxed).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sculptor.archive.store import Entry
from sculptor.checkpoint.orientation import as_out_in, to_device
from sculptor.methods.rule import Projectable
from sculptor.numerics.rounding import ulp

_ROUNDS = 400  # an honest update takes 10 to 60, one of few directions 100 to 200
_RELAXATION = 1.9  # below 2, where it stops to converge
# Of the norm of all half units, what may be left: what is hidden stays at some thousandths and more.
_LEFT = 5e-4


def rounds_an_allowed(
    base: Tensor, tuned: Tensor, entry: Entry, device: torch.device, dtypes: Sequence[torch.dtype] | None = None
) -> bool:
    """Looks for an allowed update that explains a matrix, both given as stored; False if the rule cannot project.

    Args:
        base, tuned: before and after.
        entry: of the archive.
        device: where the float64 products run.
        dtypes: what the tuned one was rounded to, once each; default its own.
    """
    rule, transposed = entry.rule, entry.record.transposed
    if not isinstance(rule, Projectable):
        return False
    weight, tuned = to_device(base, transposed, device), as_out_in(tuned.to(device), transposed)
    update = tuned.to(torch.float64) - weight
    reach = sum((ulp(tuned, dtype) for dtype in dtypes or [tuned.dtype]), start=torch.zeros_like(update)) / 2
    lowest, highest = update - reach, update + reach
    limit = _LEFT * float(reach.norm())
    project = rule.projection(weight, entry.tensors)
    found = project(update)
    for _ in range(_ROUNDS):
        inside = found.clamp(lowest, highest)
        if float((found - inside).norm()) <= limit:
            return True
        found += _RELAXATION * (project(inside) - found)
    return False
