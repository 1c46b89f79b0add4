"""New rows of an embedding or head, trained while all others stay.

Of a parameter W (vocabulary, ...) only rows [start, stop) are trained: as a parameter of their own in float32, which is written
into W before every forward pass and takes these rows of W's gradient. Old rows are never touched, so they stay as they are,
byte for byte.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.checkpoint.vocabulary import Growth


@dataclass(frozen=True, eq=False, slots=True)
class NewRows:
    """The new rows of one parameter.

    Attributes:
        name: of what is trained.
        whole: the parameter.
        values: its new rows, float32; what the optimizer changes.
    """

    name: str
    whole: nn.Parameter
    values: nn.Parameter


def row_owners(model: Any, growth: Growth) -> dict[str, tuple[str, ...]]:
    """Parameter that has new rows -> its tensors in the files; a tied one comes once, under its first name."""
    owners: dict[int, list[str]] = defaultdict(list)
    for parameter in growth.tensors:
        owners[id(model.get_parameter(parameter))].append(parameter)
    return {names[0]: tuple(growth.tensors[name] for name in names) for names in owners.values()}


def rows_name(parameter: str, growth: Growth) -> str:
    """What the new rows of a parameter are called in saved states."""
    return f"{parameter}[{growth.start}:{growth.stop}]"


def open_rows(model: Any, growth: Growth | None) -> tuple[NewRows, ...]:
    """Makes the new rows of a model trainable; parameters that are trained as a whole are left alone."""
    if growth is None:
        return ()
    made = []
    for parameter in row_owners(model, growth):
        whole = model.get_parameter(parameter)
        if whole.requires_grad:
            continue
        values = nn.Parameter(whole.detach()[growth.start : growth.stop].to(torch.float32, copy=True))
        whole.requires_grad_(True)
        whole.register_post_accumulate_grad_hook(functools.partial(_collect, growth.start, values))
        made.append(NewRows(rows_name(parameter, growth), whole, values))
    model.register_forward_pre_hook(functools.partial(_write, tuple(made), growth.start))
    return tuple(made)


@torch.no_grad()
def _collect(start: int, values: nn.Parameter, whole: Tensor) -> None:
    """A gradient of the whole has appeared: only the new rows' is kept."""
    assert whole.grad is not None
    part = whole.grad[start : start + values.shape[0]].to(torch.float32, copy=True)
    whole.grad = None
    values.grad = part if values.grad is None else values.grad + part


@torch.no_grad()
def _write(made: tuple[NewRows, ...], start: int, model: nn.Module, inputs: Any) -> None:
    """A forward pass of the model begins: the optimizer may have stepped, or another state have been loaded."""
    for rows in made:
        rows.whole.data[start : start + rows.values.shape[0]].copy_(rows.values)
