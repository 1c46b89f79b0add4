"""`merge`: the coordinates of a protected model folded back into plain weights."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sculptor.checkpoint.windows import Window
from sculptor.errors import ArchiveError
from sculptor.model.experts import TakenOver
from sculptor.training.parallelism import heed_in_broadcasts
from sculptor.training.protect import EXPERTS, ProtectedMatrix, begin_pass, buffers_of, look_at_it, protected_matrices
from sculptor.training.saved import save_as_before


def _restore(module: nn.Module, matrices: Sequence[ProtectedMatrix]) -> None:
    """Gives a module its plain weight back; torch's own way takes the weight from copies of the module too."""
    if not matrices[0].coordinates.record.window.is_whole:
        TakenOver(module).remove()
        del module._modules[EXPERTS]
        return
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    if len(parametrizations) > 1:  # somebody else's beside ours
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        return
    original: nn.Parameter = parametrizations["weight"].original  # type: ignore[assignment]
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    module.register_parameter("weight", original)


@torch.no_grad()
def merge(model: Any) -> Any:
    """Folds the coordinates of a protected model into its weights and removes them, in place.

    What others wrote into folded weights is refused, but with `fold="manual"`, where it is not seen, and is lost.

    Args:
        model: that `protect` was called on.

    Returns:
        `model`, with its modules as they were before `protect`, and no trainable parameters.

    Raises:
        ArchiveError: if the model is not protected.
        TrainingError: if other programs have taken parts of it, or written into it.
    """
    if not (matrices := protected_matrices(model)):
        raise ArchiveError("the model is not protected; call sculptor.protect(model, archive) first")
    for matrix in matrices:
        matrix.coordinates.check(matrix.pristine)
    for source in {id(matrix.coordinates.source): matrix.coordinates.source for matrix in matrices}.values():
        source.check_untouched()
    for module in model.modules():  # it may be wrapped
        _unhook(module)
    for module, own in _by_module(matrices).items():
        merged: dict[nn.Parameter, list[tuple[Window, Tensor]]] = {}
        for matrix in own:
            found = matrix.coordinates
            part = (found.record.window, found.merged(matrix.pristine).tensor)
            merged.setdefault(found.original(module), []).append(part)
        _restore(module, own)
        for original, parts in merged.items():
            original.data = _assembled(original.data, parts)
            original.requires_grad_(False)
    return model


def _assembled(original: Tensor, parts: Sequence[tuple[Window, Tensor]]) -> Tensor:
    """A parameter with merged matrices in it; its own memory may be somebody else's, too."""
    if len(parts) == 1 and parts[0][0].is_whole:
        return parts[0][1]
    value = original.clone()
    for window, tensor in parts:
        window.of(value).copy_(tensor)
    return value


def _by_module(matrices: Sequence[ProtectedMatrix]) -> dict[nn.Module, list[ProtectedMatrix]]:
    found: dict[nn.Module, list[ProtectedMatrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.module, []).append(matrix)
    return found


def _unhook(module: nn.Module) -> None:
    """Undoes what `protect` leaves beside the coordinates."""
    save_as_before(module)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, functools.partial) and hook.func in (begin_pass, look_at_it):
            del module._forward_pre_hooks[key]
            if hook.func is look_at_it:
                heed_in_broadcasts(module, buffers_of(hook.args[0]))
