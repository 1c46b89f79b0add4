"""One pass over two checkpoints: the edited tensors of the one that is copied, one at a time."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from sculptor.checkpoint.writer import Edit as Change
from sculptor.checkpoint.writer import output_dtype
from sculptor.edits.difference import Edit, Edited, Where, edit_tensor
from sculptor.edits.pairs import Pairs
from sculptor.numerics.transfer import moved

# Told of every tensor: where, W0 and W1 as stored, how much stays, and what came out.
Seen = Callable[[Where, Tensor, Tensor, float, Edited], None]


class EditPass:
    """Makes edited tensors.

    Args:
        pairs: the two checkpoints.
        edit: what is done to their difference.
        device: where products run.
        saved: dtype of floating-point tensors; None keeps those of the checkpoint that is copied.
        seen: told of every tensor.
        kept: what `edit` keeps, by tensor and slice, float32; filled and used, where the same is made more than once.
    """

    def __init__(
        self,
        pairs: Pairs,
        edit: Edit,
        device: torch.device,
        saved: torch.dtype | None = None,
        seen: Seen | None = None,
        kept: dict[tuple[str, int | None], Tensor] | None = None,
    ) -> None:
        self.pairs, self.edit, self.device, self.saved, self.seen = pairs, edit, device, saved, seen
        self._known = kept

    def changes(self) -> dict[str, Change | Mapping[int, Change]]:
        """What makes each tensor of the one that is copied, for its writer."""
        return {name: self._change(name) for name in self.pairs.by_name}

    def tensor(self, name: str) -> Tensor:
        """A tensor after the edit, whole."""
        change = self._change(name)
        old = self.pairs.source[name]
        if not isinstance(change, Mapping):
            return change(old)
        return torch.stack([change[part](old[part]) for part in range(old.shape[0])])

    def _change(self, name: str) -> Change | Mapping[int, Change]:
        shape = self.pairs.source.infos[name].shape
        if self.edit.is_sliced(name, shape):
            return {part: partial(self._make, name, part) for part in range(shape[0])}
        return partial(self._make, name, None)

    def _make(self, name: str, part: int | None, old: Tensor) -> Tensor:
        where = Where(name, part, self.pairs.by_name[name].place)
        base, tuned = self.pairs.read(name, part, old)
        on = base.to(self.device), tuned.to(self.device)
        factor = self.edit.factor(where)
        kept = None if self.edit.by_entry or not factor else self._kept(where, *on)
        edited = edit_tensor(where, *on, factor, output_dtype(old.dtype, self.saved), kept)
        if self.seen is not None:
            self.seen(where, base, tuned, factor, edited)
        return edited.tensor

    def _kept(self, where: Where, base: Tensor, tuned: Tensor) -> Tensor:
        key = where.name, where.part
        if self._known is not None and key in self._known:
            return self._known[key].to(self.device)
        kept = self.edit.kept(where, base, tuned.to(torch.float64) - base.to(torch.float64))
        if self._known is not None:
            self._known[key] = moved(kept, "cpu", torch.float32)
        return kept
