"""Stacked experts in training: every matrix is asked for by itself, folded if it is trained, and gets a gradient of its own."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sculptor.archive.manifest import MatrixRecord
from sculptor.checkpoint.windows import Window
from sculptor.model.experts import Rows, TakenOver, product, take_over


class Piece(NamedTuple):
    """Some rows of an expert's matrix, and what gives the weight to use in the place of what the module holds."""

    window: Window
    ask: Callable[[Tensor], Tensor]


Pieces = Mapping[tuple[str, int], Sequence[Piece]]


def leaf_of(record: MatrixRecord) -> str:
    """What the parameter is called in its module."""
    return record.parameter.rpartition(".")[2]


def run_in_pieces(module: Any, asked: Iterable[tuple[str, Window, Callable[[Tensor], Tensor]]]) -> TakenOver:
    """Has a module of experts ask for some matrices' weights when it runs; the others are used as they are.

    Args:
        module: of experts.
        asked: the parameter in it, the window of it that is a matrix, and what gives the weight.
    """
    found: dict[tuple[str, int], list[Piece]] = defaultdict(list)
    for leaf, window, ask in asked:
        assert window.part is not None
        found[leaf, window.part].append(Piece(window, ask))
    for pieces in found.values():
        pieces.sort(key=lambda piece: piece.window.rows or (0, 0))
    return take_over(module, partial(_multiply, dict(found)))


def _multiply(pieces: Pieces, module: Any, leaf: str, expert: int, rows: Rows) -> Tensor:
    stored = getattr(module, leaf)
    made = [
        product(rows, piece.ask(piece.window.of(stored)), module.is_transposed)
        for piece in _all_rows(pieces.get((leaf, expert), ()), expert, stored.shape[2 if module.is_transposed else 1])
    ]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _all_rows(pieces: Sequence[Piece], expert: int, rows: int) -> Iterator[Piece]:
    """The pieces of an expert's matrix, in order, with what lies between them."""
    start = 0
    for piece in pieces:
        first, last = piece.window.rows or (0, rows)
        if first > start:
            yield Piece(Window(expert, (start, first)), _as_it_is)
        yield piece
        start = last
    if start < rows:
        yield Piece(Window(expert, (start, rows) if start else None), _as_it_is)


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


class _Tapped(torch.autograd.Function):
    """Hands on a weight; its gradient goes to `give` and no further."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, trigger: Tensor, give: Callable[[Tensor], None]) -> Tensor:
        ctx.give = give
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.give(gradients[0])
        return None, None, None


def tap(give: Callable[[Tensor], None], device: torch.device) -> Callable[[Tensor], Tensor]:
    """What hands on a weight that is no parameter, and gives its gradient to `give` as soon as it appears."""
    trigger = torch.empty(0, device=device, requires_grad=True)

    def ask(weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return weight
        made: Tensor = _Tapped.apply(weight, trigger, give)  # type: ignore[no-untyped-call]
        return made

    return ask
