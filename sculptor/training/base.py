"""A protected model as its base, for a forward: coordinates off, openly trained parameters as they were; no second model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sculptor.training.protect import protected_matrices


class BaseWeights:
    """Swaps the base's weights in and out: `with as_base(): model(...)`.

    Args:
        model: protected, and resident.
        extra: openly trained parameters, as they are at the base; a copy of these is what it costs.
    """

    def __init__(self, model: Any, extra: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._coordinates = [matrix.coordinates for matrix in protected_matrices(model)]
        self._extra = [(value, value.detach().clone()) for value in extra.values()]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Without dropout: the base's predictions are what they are."""
        training = self._model.training
        trained = [value.data for value, _ in self._extra]
        self._switch(True)
        for value, base in self._extra:
            value.data = base
        if training:
            self._model.eval()
        try:
            yield
        finally:
            self._switch(False)
            for (value, _), data in zip(self._extra, trained, strict=True):
                value.data = data
            if training:
                self._model.train()

    def _switch(self, off: bool) -> None:
        for coordinates in self._coordinates:
            coordinates.off = off
