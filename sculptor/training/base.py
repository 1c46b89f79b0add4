"""A protected model as its base, for a forward: coordinates off, openly trained parameters as they were; no second model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sculptor.checkpoint.modes import evaluating
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
        trained = [value.data for value, _ in self._extra]
        self._switch(True)
        for value, base in self._extra:
            value.data = base
        try:
            with evaluating(self._model):
                yield
        finally:
            self._switch(False)
            for (value, _), data in zip(self._extra, trained, strict=True):
                value.data = data

    def _switch(self, off: bool) -> None:
        for coordinates in self._coordinates:
            coordinates.off = off
