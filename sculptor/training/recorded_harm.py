"""Harm on the same samples again and again, in passes that are recorded when they first come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sculptor.data.batches import Batch, collate
from sculptor.data.examples import IGNORED
from sculptor.model.decoding import Record
from sculptor.model.harm import by_sample, sample_losses
from sculptor.model.load import LoadedModel
from sculptor.model.loss import masked_inputs
from sculptor.model.samples import Sample, joined
from sculptor.numerics.divergence import Truncated, estimated_divergence
from sculptor.training.passes import LONG
from sculptor.training.precision import autocast
from sculptor.training.settings import TrainSettings


@dataclass(eq=False, slots=True)
class _Recorded:
    """A pass over some samples: what it reads, what it leaves, and what plays it."""

    samples: tuple[Sample, ...]
    batch: Batch
    base: Truncated
    columns: Tensor
    places: Tensor
    sums: Tensor
    play: Callable[[], None] = field(default=lambda: None)


class RecordedLosses:
    """As `sample_losses`, of a causal model whose passes can be recorded.

    Args:
        loaded, settings: of the training.
        expire: has every weight folded again when it is next read.
        record: records a pass; a RuntimeError says that it cannot.
    """

    def __init__(
        self, loaded: LoadedModel, settings: TrainSettings, expire: Callable[[], None], record: Record
    ) -> None:
        self._loaded = loaded
        self._settings = settings
        self._expire = expire
        self._record = record
        self._size = sum(parameter.numel() for parameter in loaded.model.parameters())
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._is_able = True

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """KL(base || new), summed over each sample's tokens and of its first alone (rows, 2), float64, without gradients."""
        found = self._recorded.get(tuple(map(id, samples))) or self._made(tuple(samples))
        if found is None:
            return sample_losses(self._loaded.model, samples, self._loaded.device, self._loaded.pad_id)
        found.play()
        return found.sums.clone()

    def close(self) -> None:
        """Gives back what is kept between calls; passes are recorded no more."""
        self._recorded.clear()
        self._is_able = False

    def _made(self, samples: tuple[Sample, ...]) -> _Recorded | None:
        device = self._loaded.device
        batch = collate([sample.example for sample in samples], self._loaded.pad_id).to(device)
        if not self._is_able or 2 * self._size * batch.input_ids.numel() > LONG:
            return None
        wanted = batch.labels[:, 1:] != IGNORED
        columns = wanted.any(dim=0).nonzero().flatten()
        places = wanted[:, columns].flatten().nonzero().flatten()
        sums = torch.zeros(len(samples), 2, dtype=torch.float64, device=device)
        found = _Recorded(samples, batch, joined(samples, device), columns, places, sums)
        try:
            found.play = self._record(lambda: self._pass(found))
        except RuntimeError:  # a model that waits for the device, no memory: as without a recording
            self._is_able = False
            return None
        finally:
            self._expire()  # what was folded belongs to the recording
        self._recorded[tuple(map(id, samples))] = found
        return found

    def _pass(self, found: _Recorded) -> None:
        model = self._loaded.model
        self._expire()
        with torch.no_grad(), autocast(self._settings.precision, self._loaded.device, cached=False):
            outputs = model(**masked_inputs(model, found.batch), logits_to_keep=found.columns)
            apart = estimated_divergence(found.base, outputs.logits.flatten(0, 1)[found.places])
        found.sums.copy_(by_sample(apart, found.samples))
