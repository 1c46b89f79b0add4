"""The order of rows, and padded tensors. Everything is a function of seed and step, so a run can be taken up."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sculptor.checkpoint.architecture import ModelKind
from sculptor.data.examples import IGNORED, Example
from sculptor.data.mixture import Mixture
from sculptor.world import ALONE, World

# Rows are sorted by length inside pools of this many batches: little padding, nearly the full randomness.
_POOL_BATCHES = 32
_MASK_SHARE = 0.15  # BERT: 15 % of the tokens are predicted, of which 80 % masked, 10 % random, 10 % kept


class BatchPlan:
    """Which rows each optimizer step takes: shuffled every epoch, grouped by length, repeated for ever.

    With a mixture an epoch is a part of the rows; the next one goes on where it stopped.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        world: World = ALONE,
        mixture: Mixture | None = None,
    ) -> None:
        self.lengths = lengths
        self.mixture = mixture
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.steps_per_epoch = -(-(len(lengths) if mixture is None else mixture.num_epoch) // batch_size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of a step that are this process's, longest first."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return list(self.world.share(self._batches[position]))

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.mixture is not None:
            kept = set(self.mixture.rows(epoch, self.seed))
            order = [i for i in order if i in kept]
        pool = self.batch_size * _POOL_BATCHES
        batches = []
        for start in range(0, len(order), pool):
            ordered = sorted(order[start : start + pool], key=lambda i: -self.lengths[i])
            batches += [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in shuffled]


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Padded tensors of one micro-batch, (B, T) each; `labels` (B, L) has the decoder's length there, (B, 1) for classes."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_types: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads, padding excluded."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        types = None if self.token_types is None else self.token_types.to(device)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), types)


class Widths(NamedTuple):
    """What rows are padded to: a multiple, but no more than the most a model takes, unless they are longer."""

    multiple: int = 1
    most: int | None = None

    def of(self, longest: int) -> int:
        """For the longest row of a batch."""
        found = -(-longest // self.multiple) * self.multiple
        return found if self.most is None else max(longest, min(found, self.most))


EXACT = Widths()


def collate(
    examples: Sequence[Example], pad_id: int, widths: Widths = EXACT, label_widths: Widths | None = None
) -> Batch:
    """Pads examples on the right, labels to widths of their own if these are given."""
    input_ids = _pad([example.input_ids for example in examples], pad_id, widths)
    mask = _pad([(1,) * len(example.input_ids) for example in examples], 0, widths)
    labels = _pad([example.labels for example in examples], IGNORED, label_widths or widths)
    if not any(example.token_types for example in examples):
        return Batch(input_ids, mask, labels)
    types = [example.token_types or (0,) * len(example.input_ids) for example in examples]
    return Batch(input_ids, mask, labels, _pad(types, 0, widths))


def _pad(sequences: Sequence[Sequence[int]], value: int, widths: Widths) -> Tensor:
    width = widths.of(max(map(len, sequences)))
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences])


def row_generator(*ids: int) -> torch.Generator:
    """Draws what follows from a row alone, whatever batch it is in."""
    own = hashlib.sha256(array("q", ids).tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(own[:7], "little"))


def mask_tokens(example: Example, mask_id: int, vocab_size: int, seed: int) -> Example:
    """Masked language modelling (BERT): 15 % of the maskable tokens are to be predicted, at least one a row.

    What is masked follows from the row and the seed alone, whatever batch the row is in.
    """
    generator = row_generator(seed, *example.input_ids)
    ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
    chance = torch.rand(labels.shape, generator=generator)
    kind = torch.rand(labels.shape, generator=generator)
    random_ids = torch.randint(vocab_size, labels.shape, generator=generator)
    maskable = labels != IGNORED
    chosen = maskable & (chance < _MASK_SHARE)
    if not bool(chosen.any()):
        chosen[torch.where(maskable, chance, 2.0).argmin()] = True
    ids = torch.where(chosen & (kind < 0.8), mask_id, ids)
    ids = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, ids)
    return Example(tuple(ids.tolist()), tuple(torch.where(chosen, labels, IGNORED).tolist()))


def make_batch(
    examples: Sequence[Example],
    kind: ModelKind,
    pad_id: int,
    mask_id: int | None,
    vocab_size: int,
    seed: int,
    widths: Widths = EXACT,
) -> Batch:
    """One micro-batch for a kind of model; `seed` decides what is masked."""
    if kind == "masked":
        assert mask_id is not None
        examples = [mask_tokens(example, mask_id, vocab_size, seed) for example in examples]
    return collate(examples, pad_id, widths, EXACT if kind == "classifier" else None)
