"""The forward and backward pass of a micro-batch, one kernel after another."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from sculptor.data.batches import Batch, Widths
from sculptor.model.load import LoadedModel
from sculptor.model.loss import AsBase, batch_loss
from sculptor.model.samples import Sample
from sculptor.numerics.kernels import attention, multiple_of_lengths
from sculptor.training.precision import autocast, compute_dtype
from sculptor.training.settings import TrainSettings

LONG = 4e13  # operations of a pass that takes longer than launching it does, on any GPU


class Passed(NamedTuple):
    """Of a micro-batch: its share of the step's loss, and of KL(base || new) where that is asked for."""

    loss: Tensor
    divergence: Tensor | None


class Passes:
    """One kernel after another.

    Args:
        loaded: a model that is prepared for training.
        settings: resolved.
        as_base: makes the model its base, for a KL term on the rows' own tokens; None without one.
    """

    def __init__(self, loaded: LoadedModel, settings: TrainSettings, as_base: AsBase | None) -> None:
        self.loaded = loaded
        self.settings = settings
        self.as_base = as_base

    def begin_step(self) -> None:
        """Micro-batches of another step follow."""

    @property
    def sample_losses(self) -> Callable[[Sequence[Sample]], Tensor] | None:
        """As `sculptor.model.harm.sample_losses` of the model as it is, where this has a way of its own."""
        return None

    @property
    def widths(self) -> Widths:
        """What rows are padded to."""
        dtype = compute_dtype(self.settings.precision, self.loaded.device)
        multiple = multiple_of_lengths(self.loaded.device, dtype)
        return self.loaded.padded_to(multiple) if multiple > 1 else self.loaded.widths

    def close(self) -> None:
        """Gives back what is kept between steps."""

    def run(self, batch: Batch, total_tokens: int) -> Passed:
        """Adds to the gradients those of the loss of a batch, on the host, over all tokens of its step."""
        precision, device = self.settings.precision, self.loaded.device
        with attention(device, compute_dtype(precision, device), batch.input_ids.shape[-1]):
            with autocast(precision, device):
                found = batch_loss(
                    self.loaded.model,
                    batch.to(device),
                    self.loaded.kind,
                    by_entropy=self.settings.token_weights == "entropy",
                    as_base=self.as_base,
                )
            share = found.total / total_tokens
            if found.auxiliary is not None:
                share = share + found.auxiliary * (found.num_tokens / total_tokens)
            loss, apart = share.detach(), None
            if found.divergence is not None:
                assert self.settings.kl_weight is not None
                apart = found.divergence.detach() / total_tokens
                share = share + self.settings.kl_weight * (found.divergence / total_tokens)
            if share.requires_grad:  # layer dropping may leave out everything that is trained
                share.backward()  # type: ignore[no-untyped-call]
        return Passed(loss, apart)
