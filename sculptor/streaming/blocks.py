"""One transformer block on the device at a time, under an unmodified transformers model.

Every block's `forward` is overridden on the instance. It waits until the block's parameters are in a slot of device
memory, points the parameters there, starts to fill the other slot with what comes next, and runs. In training it runs
inside our own non-reentrant checkpoint, so the same happens again in the backward pass, last block first; a block is
finished there when the one before it begins. Parameters stay the same objects: only their `.data` moves between a slot
and nothing. Waiting is done by the device, on events.

Where several processes divide the parameters, each shows the others its part of a block as it is fetched. So all of them fetch
the same blocks in the same order, whatever they make of them: what one process leaves out, a block that its rows skip or a
whole pass for which it has no rows, it passes by.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sculptor.errors import TrainingError
from sculptor.streaming.inputs import InputStore
from sculptor.streaming.layout import Layout
from sculptor.streaming.parts import Call, is_norm, join, parts_work, split_call, split_paths, without_cache
from sculptor.streaming.regions import BlockWeights
from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Ticket, Transfers


class Observer:
    """What training adds to a backward pass; this one adds nothing."""

    def block_begun(self, block: int) -> None:
        """Its gradients are about to appear."""

    def block_done(self, block: int, slot: Slot) -> None:
        """They have all appeared; its parameters are in `slot`."""


class BlockStream:
    """The blocks of a model on their way to the device and back.

    Args:
        model: the model; parameters of the blocks that are streamed hold nothing.
        blocks: path -> block, in the order of the model.
        parameters: of each block, by name.
        weights: where these wait.
        transfers: the lanes.
        num_slots: blocks on the device at a time; 2 to load ahead.
        keep_inputs: whether activation checkpoints, the inputs of the blocks, stay on the device.

    Attributes:
        slots: device memory for blocks, which counts how often each was brought there.
        recompute: what to enter around the second run of a block, in the backward pass.
        refill: fills a slot with a block that has changed since it was stored, and says what to wait for; None if it has not.
        beside: of blocks, what else has to be on the device for their backward passes.
        observer: what training adds to these.
        part_tokens: of a batch with more tokens, a block sees so many at a time (or one row, if longer), and so does a
            norm outside of the blocks; None for all at once.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, nn.Module],
        parameters: Sequence[Mapping[str, nn.Parameter]],
        weights: BlockWeights,
        transfers: Transfers,
        *,
        num_slots: int,
        keep_inputs: bool,
    ) -> None:
        self.paths = list(blocks)
        self.parameters = [dict(found) for found in parameters]
        self.weights = weights
        self.transfers = transfers
        self.device = transfers.device
        self.recompute: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.refill: Callable[[int, Slot], list[Ticket] | None] = lambda block, slot: None
        self.beside: Mapping[int, Sequence[Slots]] = {}
        self.observer = Observer()
        size = max(layout.num_bytes for layout in weights.layouts)
        self.slots = Slots(num_slots, size, self.device, self._fill)
        self._inputs = None if keep_inputs else InputStore(transfers)
        self._order = list(range(len(self.paths)))  # blocks by call, as the last forward made them
        self._calls = 0  # in the forward under way
        self._backward: tuple[int, int] | None = None  # the block whose gradients are appearing, and its call
        self.divided = weights.owners is not None
        self._passed = 0  # blocks that the forward pass has come by, where all processes have to
        self._left = len(self.paths)  # blocks that the backward pass has not come by
        self.part_tokens: int | None = None
        self._parts_work: dict[tuple[Any, ...], bool] = {}  # by kind of call, as far as tried
        self._hook = model.register_forward_pre_hook(lambda *_: self._begin())
        for i, block in enumerate(blocks.values()):
            block.forward = self._streamed(i, block)
        self._blocks = list(blocks.values())
        inside = tuple(f"{path}." for path in self.paths)
        self._norms = [m for path, m in model.named_modules() if is_norm(m) and not f"{path}.".startswith(inside)]
        for norm in self._norms:
            norm.forward = self._in_parts(norm)

    @property
    def layouts(self) -> Sequence[Layout]:
        """Of the parameters of each block."""
        return self.weights.layouts

    def _begin(self) -> None:
        self._calls = self._passed = 0
        self._left = len(self.paths)
        if torch.is_grad_enabled() and self._backward is not None:  # a backward pass that broke off
            self._empty(self._backward[0])
            self._backward = None

    def _streamed(self, index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            call = self._calls
            self._calls += 1
            if self._order[call : call + 1] != [index]:
                self._order[call:] = [index]
            if not torch.is_grad_enabled():
                with self._present(index, call):
                    return forward(*args, **kwargs)
            args, kwargs = without_cache(args, kwargs)
            parts = split_call(args, kwargs, self.part_tokens) if self.part_tokens else None
            if parts is None or not self._works_apart(index, call, block, forward, (args, kwargs), parts):
                return self._checkpointed(index, call, 0, forward, args, kwargs)
            found = [self._checkpointed(index, call, i, forward, *part) for i, part in enumerate(parts)]
            return join(found, [len(args[0]) for args, _ in parts])

        return run

    def _works_apart(
        self, index: int, call: int, block: nn.Module, forward: Callable[..., Any], whole: Call, parts: Sequence[Call]
    ) -> bool:
        """Whether parts give what the whole does; tried once for each kind of call."""
        kind = self.paths[index].rpartition(".")[0], type(block), split_paths(*whole)
        if kind not in self._parts_work:
            with self._present(index, call):
                self._parts_work[kind] = parts_work(block, forward, whole, parts)
        return self._parts_work[kind]

    def _in_parts(self, norm: nn.Module) -> Callable[..., Any]:
        """A norm outside of the blocks, which would keep float32 copies of a whole batch."""
        forward = norm.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            tokens = self.part_tokens if torch.is_grad_enabled() and len(args) == 1 and not kwargs else None
            parts = split_call(args, kwargs, tokens) if tokens else None
            if parts is None:
                return forward(*args, **kwargs)
            again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            return join([again(*args, **kwargs) for args, kwargs in parts], [len(args[0]) for args, _ in parts])

        return run

    def _checkpointed(
        self,
        index: int,
        call: int,
        part: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a block, or a part of its batch, now, and again in the backward pass."""
        before = self._order[call - 1] if call else None
        held = self._inputs.hold((call, part), args) if self._inputs is not None else None

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return self._present(index, call), self._again(index, before, call)

        if held is None:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        # The empty tensor tells `checkpoint` the device, whose random state it keeps.
        found = checkpoint(
            lambda _, *rest, **named: forward(held.take(), *rest, **named),
            args[0].new_empty(0),
            *args[1:],
            use_reentrant=False,
            context_fn=contexts,
            **kwargs,
        )
        held.leave()
        return found

    @contextmanager
    def _present(self, index: int, call: int) -> Iterator[None]:
        """A block's parameters are on the device; what comes next is on its way."""
        if self.divided:
            self._come_to(index)
        slot = self._enter(index)
        try:
            yield
        finally:
            slot.uses["compute"] = self.transfers.mark()
            self._empty(index)
        # Only now that the device has this block to run: fetching the next one may have to wait for the host.
        after = self._next(index, call)
        if self._passed == len(self.paths) and not torch.is_grad_enabled():
            self._passed = 0  # nothing follows
        if after is not None:
            self.slots.fetch_ahead(after)
        elif torch.is_grad_enabled():
            self._fetch_beside(index)

    def _fetch_beside(self, index: int) -> None:
        """The backward pass of a block comes next but one."""
        for slots in self.beside.get(index, ()):
            slots.fetch_ahead(index)

    def _next(self, index: int, call: int) -> int | None:
        """What the forward pass fetches after a block."""
        if self.divided:
            return index + 1 if index + 1 < len(self.paths) else None
        return self._order[call + 1] if call + 1 < len(self._order) else None

    def _come_to(self, index: int) -> None:
        """Passes by the blocks before one that the forward pass leaves out."""
        if index < self._passed - 1 or self._left < len(self.paths):
            raise TrainingError(
                f"{self.paths[index]} comes out of turn in a forward pass; it cannot be divided, use --parallel replicate"
            )
        for skipped in range(self._passed, index):
            with self._present(skipped, -1):
                pass
        self._passed = index + 1

    def end_pass(self, training: bool) -> None:
        """This process is done with a pass, if it had rows for it at all; comes by what it has left out."""
        self.end_backward()
        if not self.divided:
            return
        with torch.set_grad_enabled(training):
            self._come_through()
        if training:
            self._turn_past(-1)
            self.end_backward()
        self._passed, self._left = 0, len(self.paths)

    def _come_through(self) -> None:
        """Passes by the blocks that the forward pass leaves out at its end."""
        if self._passed < len(self.paths):
            with self._present(len(self.paths) - 1, -1):
                pass

    def _turn_past(self, index: int) -> None:
        """Passes by the blocks after one that the backward pass leaves out."""
        self._come_through()
        for skipped in range(self._left - 1, index, -1):
            self._turn_to(skipped, skipped - 1 if skipped else None, None)

    @contextmanager
    def _again(self, index: int, before: int | None, call: int) -> Iterator[None]:
        """The block runs again, and its gradients follow."""
        if self._backward != (index, call):  # else another part of its batch
            if self._backward is None:  # whoever calls backward need not say when it is over
                torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)
            if self.divided:
                before = index - 1 if index else None
                self._turn_past(index)
            self._turn_to(index, before, call)
        with self.recompute():
            yield

    def _turn_to(self, index: int, before: int | None, call: int | None) -> None:
        """The backward pass comes to a block; None for `call` where it only passes by."""
        self.end_backward()
        self._enter(index)
        self._backward = index, -1 if call is None else call
        self._left = index
        self.observer.block_begun(index)
        if before is not None:
            # Weights last: after a fused update their slot is the last to be free, and the lane waits behind them.
            if self._inputs is not None and call is not None:
                self._inputs.fetch(call - 1)
            self._fetch_beside(before)
            self.slots.fetch_ahead(before)

    def end_backward(self) -> None:
        """The backward pass is over, or goes on with another block."""
        if self._backward is None:
            return
        (index, _), self._backward = self._backward, None
        slot = self.slots.find(index)
        assert slot is not None
        slot.uses["compute"] = self.transfers.mark()
        self._empty(index)
        self.observer.block_done(index, slot)

    def _enter(self, index: int) -> Slot:
        slot = self.slots.enter(index)
        layout = self.layouts[index]
        for name, parameter in self.parameters[index].items():
            parameter.data = layout.view(slot.memory, name)
        return slot

    def _empty(self, index: int) -> None:
        for parameter in self.parameters[index].values():
            parameter.data = parameter.data.new_empty(0)

    def _fill(self, index: int, slot: Slot) -> list[Ticket]:
        found = self.refill(index, slot)
        if found is None:
            after = [*slot.taken(), self.weights.written(index)]
            found = [self.transfers.load(partial(self.weights.load, index, slot.memory), after)]
        if (owners := self.weights.owners) is None:
            return found
        return [self.transfers.load(partial(owners.show, index, self.layouts[index], slot.memory), found)]

    def close(self) -> None:
        """Gives the blocks and norms their own `forward` back, and the memory. Their parameters hold nothing then."""
        self._hook.remove()
        for module in (*self._blocks, *self._norms):
            del module.forward
        self._blocks.clear()
        self._norms.clear()
        self.transfers.close()
        self.weights.close()
        self.slots.close()
        if self._inputs is not None:
            self._inputs.close()
