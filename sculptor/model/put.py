"""Other weights in a model that is in memory, by the names that its checkpoint gives them."""

from collections.abc import Callable, Container

import torch
from torch import Tensor

from sculptor.checkpoint.names import Conversion, find_converted
from sculptor.checkpoint.reader import Checkpoint
from sculptor.model.load import LoadedModel


@torch.no_grad()
def put_tensors(loaded: LoadedModel, source: Checkpoint, names: Container[str], make: Callable[[str], Tensor]) -> None:
    """Puts tensors into a resident model.

    Args:
        loaded: the model.
        source: the checkpoint that it was loaded from.
        names: of the tensors of that which are other ones.
        make: gives one of them.
    """
    values = loaded.model.state_dict()
    for parameter, name in loaded.architecture.tensors.items():
        if parameter in values and name in names:
            values[parameter].copy_(make(name))
    conversions: dict[int, Conversion] = {id(each): each for each in find_converted(loaded.model, source).values()}
    for conversion in conversions.values():
        for parameter, value in conversion.make(lambda name: make(name) if name in names else source[name]).items():
            values[parameter].copy_(value)
