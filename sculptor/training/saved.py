"""What a protected model saves: plain weights as every program loads them, beside the coordinates that training goes on with.

`state_dict` has the folded weight W0 + dW(W0, A) under the name it has without protection, in the place of W0. So whatever
`save_pretrained`, the Trainer or accelerate saves between `protect` and `merge`, `from_pretrained` loads as the model that it
was, and says that it left the coordinates aside. A protected model that loads it takes the coordinates; from the weights it
sees whether they belong to its archive.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sculptor.errors import TrainingError
from sculptor.numerics.precision import float32_products
from sculptor.training.coordinates import Coordinates, folded_weight

_FROM_ELSEWHERE = 0.01  # of the update: more than rounding on another device, less than any other basis gives


class Matrix(Protocol):
    """A protected matrix of a model."""

    path: str
    coordinates: Coordinates

    @property
    def pristine(self) -> nn.Parameter:
        """W0, as the module stores it."""


Find = Callable[[nn.Module], Sequence[Any]]


def save_plain(model: nn.Module, find: Find) -> None:
    """From now on the state of a protected model has plain weights.

    Args:
        model: protected.
        find: gives the protected matrices of a model.
    """
    loaded: dict[str, Tensor] = {}
    hooked: Any = model  # torch leaves these functions without types
    hooked.register_state_dict_post_hook(functools.partial(_write, find))
    hooked.register_load_state_dict_pre_hook(functools.partial(_read, find, loaded))
    hooked.register_load_state_dict_post_hook(functools.partial(_compare, find, loaded))


def save_as_before(model: nn.Module) -> None:
    """Undoes `save_plain`."""
    for hooks in (model._state_dict_hooks, model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(getattr(hook, "hook", hook), "func", None) in (_write, _read, _compare):
                del hooks[key]


@torch.no_grad()
def _folded(matrix: Matrix) -> Tensor:
    """W0 + dW in the dtype of W0, in memory of its own."""
    coordinates, pristine = matrix.coordinates, matrix.pristine
    coordinates.check(pristine)
    values = [value.detach() for value in coordinates.trained]
    with float32_products(pristine.device, tf32=True):
        return folded_weight(
            coordinates.rule,
            coordinates.tensors,
            values,
            pristine.detach(),
            coordinates.record.transposed,
            pristine.dtype,
        )


def _write(find: Find, model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for matrix in find(model):
        state.pop(f"{prefix}{matrix.path}.parametrizations.weight.original", None)
        state[f"{prefix}{matrix.path}.weight"] = _folded(matrix)


def _read(find: Find, loaded: dict[str, Tensor], model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes what is for the coordinates; W0 stays the model's own."""
    loaded.clear()
    for matrix in find(model):
        inside = f"{prefix}{matrix.path}.parametrizations.weight."
        lacking = [i for i in range(len(matrix.coordinates.trained)) if f"{inside}0.values.{i}" not in state]
        if lacking:
            raise TrainingError(
                f"{matrix.path}: no coordinates in what is loaded into a protected model; load what was saved of it before "
                "`sculptor.merge`, or give plain weights to `from_pretrained`, and their archive to `sculptor.protect`"
            )
        plain = state.pop(f"{prefix}{matrix.path}.weight", None)
        if plain is not None:
            loaded[matrix.path] = plain
        state.setdefault(f"{inside}original", matrix.pristine)


def _compare(find: Find, loaded: dict[str, Tensor], model: nn.Module, _: Any) -> None:
    """Coordinates mean nothing in other bases, and an update nothing on another W0."""
    for matrix in find(model) if loaded else ():
        plain, pristine = loaded.pop(matrix.path, None), matrix.pristine.detach()
        if plain is None:
            continue
        found, saved = _folded(matrix).float(), plain.to(pristine.device).float()
        rounding = max(torch.finfo(each.dtype).eps for each in (plain, pristine)) * float(saved.norm())
        if float((found - saved).norm()) > rounding + _FROM_ELSEWHERE * float((saved - pristine.float()).norm()):
            raise TrainingError(
                f"{matrix.path}: the coordinates that were loaded give another weight than the one saved with them; they belong "
                "to another archive or model: protect with the one that the run was begun with"
            )
